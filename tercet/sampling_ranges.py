"""What sampling parameters may be: one table for the frontend, the core and a model's own defaults.

Bounded so that float32 logits stay finite whatever the parameters: penalties, bias and the division by the
temperature together change a logit of magnitude 1e5 to 1e10 at most, far below 3e38.
"""

from typing import Final

PENALTY: Final = (-2.0, 2.0)
"""presence_penalty and frequency_penalty, as vLLM and OpenAI have it."""

REPETITION_PENALTY: Final = (0.001, 1000.0)
"""A factor; vLLM allows any above 0. At either end a seen token is certain, or ruled out, already."""

TEMPERATURE: Final = (0.0, 2.0)
"""As vLLM has it; the frontend raises what is between 0 and 0.01."""

LOGIT_BIAS: Final = (-100.0, 100.0)
"""Each value, as OpenAI has it."""
