//! What a site's daemon does for the center: one set of requests, two ways to reach them.
//!
//! ```text
//! center                                   site
//!   | -- SiteRequest --------------------> |   one stream a request
//!   | <-- SiteEvent::News ... ------------ |   as often as there is any
//!   | -- cancel (optional) --------------> |
//!   | <-- SiteEvent::Done(Result) -------- |   always last
//! ```
//!
//! Each verb is a type of its own with its reply and the version of the protocol that has it
//! ([`verbs`]); both ends of a link know from the greeting which version they speak.
//!
//! In the center's own process the same requests go to the site directly. Requests that act on
//! a machine carry its generation; a site remembers the highest it has seen and refuses less.
//!
//! # How it works
//!
//! Each end of a migration is driven by a task of its site; the center follows both and may go away
//! and come back. A site keeps a record of each machine, written before and after what a crash
//! could cut, and a tombstone of each that left. A site keeps QEMUs waiting for the four substrates
//! that were activated last. Revocations go to every site and every relay that starts.

pub mod bounds;
mod center;
pub mod exchange;
pub mod frames;
mod local;
mod remote;
#[cfg(test)]
mod tests_previous;
mod types;
pub mod verbs;

use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use godwit_transfer::wire::Versions;
use godwit_types::{Code, Fault, Name, VmId};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

pub use center::{
    API_AT_ONCE, ApiAnswer, ApiRequest, CenterHost, CenterRequest, Pieces, ask_center, serve_site,
};
pub use godwit_net::{
    Attachment, HostPort, MOST_PORTS, MacAddress, Network, NetworkKind, Prefix, PublishedPort,
    Transport,
};
pub use godwit_net::{forward_drops, lacking as networks_lack};
pub use local::{
    LocalSite, MACHINE_OVERHEAD_MIB, PUBLISH_PORTS, SiteDirs, SiteOptions, Uids, image_info,
    images_of, in_use,
};
pub use remote::{RemoteSite, serve};
pub use types::{
    CheckReport, ConsoleTail, Fell, GuestExec, GuestOutput, GuestProgram, ImageInfo, Incoming,
    MachineStatus, MemoryStatus, MoveStatus, NewMachine, News, Origin, PoolReport, Progress,
    SiteReport, StreamRequest, SubstrateInfo, TakeAmong, TookBack, UNKNOWN_GENERATION, Upload,
};
pub use verbs::{Asking, Request, SiteEvent, SiteReply, SiteRequest};

/// The first version of the protocol whose sites generalise the machine of what they dock as public.
pub const GENERALISES: u16 = 3;

/// What a list of machines says, in one hash: while it is the same, nobody need ask for the list.
#[must_use]
pub fn digest(machines: &[MachineStatus]) -> Option<godwit_types::Hash> {
    postcard::to_stdvec(machines).ok().map(|told| godwit_types::Hash::of(&told))
}

/// A byte stream in both directions: a console, a display, a substrate on its way.
pub type ByteStream = Pin<Box<dyn ReadWrite>>;

/// What a [`ByteStream`] is made of.
pub trait ReadWrite: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> ReadWrite for T {}

/// How a request tells of its progress and hears that it is to stop.
#[derive(Clone)]
pub struct Call {
    news: Arc<dyn Fn(News) + Send + Sync>,
    /// Fires when the caller wants it stopped.
    pub cancel: CancellationToken,
}

impl std::fmt::Debug for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Call").field("cancelled", &self.cancel.is_cancelled()).finish()
    }
}

impl Call {
    /// A call whose news go to `news`.
    pub fn new(news: impl Fn(News) + Send + Sync + 'static, cancel: CancellationToken) -> Self {
        Self { news: Arc::new(news), cancel }
    }

    /// A call that nobody watches.
    #[must_use]
    pub fn quiet() -> Self {
        Self::new(|_| {}, CancellationToken::new())
    }

    /// Tells how far it is.
    pub fn progress(&self, p: Progress) {
        (self.news)(News::Progress(p));
    }

    /// Passes on what happened.
    pub fn news(&self, news: News) {
        (self.news)(news);
    }
}

/// A site, near or far.
#[async_trait]
pub trait SiteHost: Send + Sync {
    /// Its name.
    fn name(&self) -> &Name;

    /// Which version of the protocol it speaks: verbs that came later cannot be asked of it.
    fn speaks(&self) -> u16 {
        Versions::OURS.max
    }

    /// Does what is asked and answers with the reply that belongs to the request. Callers use
    /// `ask`, which knows that reply's type.
    ///
    /// # Errors
    /// What the site refused, or that it could not be reached.
    async fn answer(&self, request: SiteRequest, call: Call) -> Result<SiteReply, Fault>;

    /// Opens a byte stream.
    ///
    /// # Errors
    /// What the site refused, or that it could not be reached.
    async fn open(&self, request: StreamRequest) -> Result<ByteStream, Fault>;
}

impl dyn SiteHost {
    /// Asks for something.
    ///
    /// # Errors
    /// What the site refused, or that it could not be reached; so for all below.
    pub async fn ask<R: Request>(&self, request: R, call: Call) -> Result<R::Reply, Fault> {
        self.ask_any(request.asking(), call).await
    }

    /// Asks for something by any of the verbs that have such a reply.
    ///
    /// # Errors
    /// As [`SiteHost::ask`](#method.ask).
    pub async fn ask_any<T>(&self, asking: Asking<T>, call: Call) -> Result<T, Fault> {
        let name = asking.request.name();
        let answer = self.answer(asking.request, call).await?;
        let kind = answer.label();
        (asking.reply)(answer).ok_or_else(|| {
            Fault::internal(format!("site '{}' answered '{name}' with {kind}", self.name()))
        })
    }

    /// What the site has now.
    ///
    /// # Errors
    /// As [`SiteHost::ask`](#method.ask).
    pub async fn report(&self) -> Result<SiteReport, Fault> {
        self.ask(verbs::Report {}, Call::quiet()).await
    }

    /// The images that are there.
    ///
    /// # Errors
    /// As [`SiteHost::ask`](#method.ask).
    pub async fn images(&self) -> Result<Vec<ImageInfo>, Fault> {
        self.ask(verbs::Images {}, Call::quiet()).await
    }

    /// The substrates that are there.
    ///
    /// # Errors
    /// As [`SiteHost::ask`](#method.ask).
    pub async fn substrates(&self) -> Result<Vec<SubstrateInfo>, Fault> {
        self.ask(verbs::Substrates {}, Call::quiet()).await
    }

    /// The machines that the site knows, those that ended included.
    ///
    /// # Errors
    /// As [`SiteHost::ask`](#method.ask).
    pub async fn machines(&self) -> Result<Vec<MachineStatus>, Fault> {
        self.ask(verbs::Machines {}, Call::quiet()).await
    }

    /// One machine, if it is there. A site of before `vm status` is asked for all that it has.
    ///
    /// # Errors
    /// As [`SiteHost::ask`](#method.ask).
    pub async fn machine(&self, vm: VmId) -> Result<Option<MachineStatus>, Fault> {
        if self.speaks() < verbs::VmStatus::SINCE {
            return Ok(self.machines().await?.into_iter().find(|m| m.vm == vm));
        }
        match self.ask(verbs::VmStatus { vm }, Call::quiet()).await {
            Err(f) if f.code == Code::NotFound => Ok(None),
            answer => answer.map(Some),
        }
    }
}
