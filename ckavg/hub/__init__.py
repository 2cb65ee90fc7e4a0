"""Stage *publish*: a result on the Hugging Face Hub, and what that asks of rights and answers."""
