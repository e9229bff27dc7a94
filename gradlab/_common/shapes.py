"""Types of tensors that tell their shape: `Float64[Tensor, "n t"]`.

To type checkers and readers they are tensors. Where jaxtyping is installed its import hook checks them at run time, as
`tests/test_shapes.py` has it do. Dimensions: `n` responses, `t` tokens, `v` vocabulary, `r` rows of a table, `p` parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64, Int64, Num
else:
    try:
        from jaxtyping import Bool, Float, Float64, Int64, Num
    except ImportError:

        class _Tensor:
            def __class_getitem__(cls, item: Any) -> Any:
                return item[0]

        Bool = Float = Float64 = Int64 = Num = _Tensor

__all__ = ["Bool", "Float", "Float64", "Int64", "Num"]
