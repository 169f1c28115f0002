//! Migration schemes and their relays.
