"""AdamW without PyTorch's compiler."""

from inspect import unwrap

import torch


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, which does not import ``torch._dynamo``.

    These methods are wrapped so that ``torch.compile`` leaves them alone, and the wrappers import the compiler at their
    first call: 0.15 GiB and a second of start-up for what is never compiled here.
    """

    add_param_group = unwrap(torch.optim.AdamW.add_param_group)
    load_state_dict = unwrap(torch.optim.AdamW.load_state_dict)
    state_dict = unwrap(torch.optim.AdamW.state_dict)
    zero_grad = unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))
