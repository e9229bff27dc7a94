"""What an analysis leaves behind: frames, figures and captions, the record of a run, the page that shows them."""
