"""One clip on several processes of a torch.distributed group: each computes some of the branches of each step."""
