from hypothesis import settings

# Tests must not fail because a busy machine is slow.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
