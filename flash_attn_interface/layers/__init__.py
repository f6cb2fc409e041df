"""Upstream's helpers around attention: padding, rotary embedding, norms, losses."""
