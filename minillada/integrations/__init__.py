"""Adapters to other people's programs. Nothing else imports them."""
