from utils.moved import moved

moved("tools.doctor")
