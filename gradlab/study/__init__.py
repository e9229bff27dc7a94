"""The output of an analysis: frames, figures and captions, the record of a run, the page that shows them."""
