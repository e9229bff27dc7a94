from gradlab.ledger.form import Claim

CLAIMS: tuple[Claim, ...] = ()
