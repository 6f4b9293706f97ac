"""One page of HTML about runs and models, from what other commands have measured."""
