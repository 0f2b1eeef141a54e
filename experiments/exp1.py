from utils.moved import moved

moved("experiments.votes_against_one_view")
