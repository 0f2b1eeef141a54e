"""Other systems on the same tasks, views, votes and scores, to compare with."""
