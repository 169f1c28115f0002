//! The daemons: the center, and the agent of a site that joined.
//!
//! Neither prints; they log by `tracing` and tell through [`Ready`] when they serve. Ending a
//! daemon ends no machine: the next one adopts them.

mod agent;
mod by_site;
mod center;
mod front;
mod guard;
mod https;
mod local_socket;
mod secrets;
mod tls;

use std::net::SocketAddr;

use godwit_types::Name;

pub use agent::{Agent, AgentConfig, join_site};
pub use center::{Center, CenterConfig};
pub use front::FrontConfig;
pub use local_socket::{local_socket, local_token};
pub use secrets::{ClientFiles, read_token};
pub use tls::TlsFiles;

/// The call by which a site has its certificate renewed: a certificate request, answered with a
/// certificate (DER both).
const RENEW: &str = "renew";

/// A daemon that serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// Its site.
    pub site: Name,
    /// Where its API listens, if it has one.
    pub api: Option<SocketAddr>,
    /// Where other sites reach it, if they do.
    pub link: Option<SocketAddr>,
}
