"""The ways residuals are written, family by family: rewired, or refused for the true reason.

Every pattern has a twin: a look-alike that must be treated otherwise.
"""
