"""From a picture in any form to the tensors that a vision graph reads, with Pillow and numpy."""
