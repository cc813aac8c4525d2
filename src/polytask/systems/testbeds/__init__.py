"""Testbeds: small, real, exactly labelled settings that several proofs share."""
