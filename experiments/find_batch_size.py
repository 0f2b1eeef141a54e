from utils.moved import moved

moved("tools.find_batch_size")
