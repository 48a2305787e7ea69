"""Classroom assignments, made from the real code: python -m tests.assignments --help"""
