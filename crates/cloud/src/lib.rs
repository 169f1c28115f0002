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
//!
//! # How it works
//!
//! The registry is answered from memory; one thread writes it, and changes that come together share
//! one fsync. What sites report all the time is never written. A machine and the operation that
//! makes it are written together. The number of the last commit stands in a file of its own as
//! well, so that a database that fell back by one is seen and refused. What was deleted is
//! remembered until every site has told what it runs since then. A report carries the hash of the
//! site's list of machines; the list is asked for when that, or the registry, says something new.
//! Sites are asked side by side; one that does not answer is named and not placed at. The registry
//! has a change feed (`registry/feed.rs`): each change that somebody follows (of a machine, a
//! substrate, a site, an operation's state) is an event with a revision, written in the transaction
//! of the change; what is in memory only, such as a silent site, is told between two revisions. The
//! last 4,096 events (16 MiB) are in a ring that watchers read at their own pace; those of the last
//! 1,024 transactions are in the file, so that a restarted center goes on. Each run draws an epoch
//! that stands with its first revision: an id of another history or of a time that is forgotten,
//! and a watcher that is too slow, get `reset` and list anew. Every answer to a GET names the event
//! that it shows, so a list that is followed misses nothing. Who may do what is one pure table
//! (`access`); `controller/authorize.rs` answers for what is not there as if it did not exist, and
//! `controller/origin.rs` says whose a new substrate is. A quota is counted in the transaction of
//! what it counts; the audit log is written in the transaction of the change, each entry bound by
//! hash to the one before. Events carry who could and can know of them. The center decides and
//! remembers, a site does.

pub mod access;
pub mod api;
mod clock;
pub mod controller;
pub mod daemon;
mod op_kind;
pub mod ops;
pub mod placement;
mod principal;
pub mod registry;
mod token;
