"""One clip over several processes of a torch.distributed group: each computes some of the branches of every step."""
