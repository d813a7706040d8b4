"""Models of transformers as the recipe hf trains them: loaded, tried out, and how documents pass through them."""
