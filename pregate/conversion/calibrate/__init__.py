"""Gates fitted to the source's routes: `flow` is the order of events, and names the files of its steps."""
