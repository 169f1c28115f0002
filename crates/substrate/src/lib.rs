//! Dock, pool and activate.
