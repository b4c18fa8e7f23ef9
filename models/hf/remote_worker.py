"""Loads a directory as its user does, and answers for it: the other end of `models/hf/remote_process.py`.

Run as a file in Python's isolated mode: nothing of the repository can be imported here.
"""

import io
import os
import sys
from multiprocessing.connection import Connection

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main() -> None:
    requests = Connection(os.dup(0), writable=False)
    replies = Connection(os.dup(1), readable=False)
    os.dup2(2, 1)  # what libraries print is no reply
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
    while True:
        try:
            request = torch.load(io.BytesIO(requests.recv_bytes()), weights_only=True)
        except EOFError:
            return
        if count := request["count"]:
            prompt, every = request["input_ids"], torch.ones_like(request["input_ids"])  # also what looks like padding
            answer = model.generate(prompt, attention_mask=every, max_new_tokens=count, do_sample=False)
        else:
            answer = model(request["input_ids"], use_cache=False).logits
        buffer = io.BytesIO()
        torch.save(answer, buffer)
        replies.send_bytes(buffer.getbuffer())


if __name__ == "__main__":
    main()
