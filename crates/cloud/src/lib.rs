//! Registry, placement, migration controller, site agent and API.
