"""Where other libraries let their users choose an attention implementation; one module for each.

Nothing here is imported by the package itself: `import flash_attn_interface.integrations.NAME`.
"""
