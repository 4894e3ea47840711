"""Inside transformers: plain from_pretrained and save_pretrained, and the Trainer."""
