"""fullrank: does a transformer's signal survive its depth, its context length and its heads?"""
