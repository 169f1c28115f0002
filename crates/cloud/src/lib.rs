//! Registry, placement, migration controller, API and the daemons.
//!
//! ```text
//!   command line, portal
//!        | HTTPS (api)
//!        v
//!   +--------------------------- center -----------------------------+
//!   | api -> controller -> ops (journal)                             |
//!   |           |  \--> placement (pure)                             |
//!   |           |  \--> registry (redb: who, what, where, how new)   |
//!   |           v                                                    |
//!   |      SiteHost --- LocalSite (this host's machines)             |
//!   |         \--- RemoteSite --- link --- AP agent --- LocalSite    |
//!   +----------------------------------------------------------------+
//! ```
//!
//! The center decides and remembers, a site does. Everything a site is asked to do is one
//! [`godwit_site::SiteRequest`], so that the center's own site and a joined one behave alike.

pub mod access;
pub mod api;
mod clock;
pub mod controller;
pub mod daemon;
pub mod ops;
pub mod placement;
pub mod registry;
