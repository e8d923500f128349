"""The HTTP server: OpenAI's endpoints over one thread that owns the engine.

Everything that waits is bounded: calls, connections, and the time that each may take.
"""
