"""Release of this distribution: `flash_attn_interface` refuses one that is not its own."""

RELEASE = "0.1.0"
