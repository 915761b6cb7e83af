"""Whether maps depend on what they are said to explain: the model's weights, and the pixels that change its mind."""
