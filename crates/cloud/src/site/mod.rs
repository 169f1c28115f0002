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
//! In the center's own process the same requests go to the site directly. Requests that act on
//! a machine carry its generation; a site remembers the highest it has seen and refuses less.

pub(crate) mod bounds;
pub(crate) mod frames;
mod local;
mod remote;
mod types;

use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use godwit_types::Name;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use crate::error::Fault;
use crate::ops::Progress;
use crate::registry::SiteReport;

pub(crate) use local::in_use;
/// What a list of machines says, in one hash: while it is the same, nobody need ask for the list.
#[must_use]
pub fn digest(machines: &[MachineStatus]) -> Option<godwit_types::Hash> {
    postcard::to_stdvec(machines).ok().map(|told| godwit_types::Hash::of(&told))
}

pub use local::{LocalSite, SiteDirs, SiteOptions, Uids, image_info, images_of};
pub use remote::{RemoteSite, serve};
pub use types::{
    CheckReport, ConsoleTail, GuestExec, GuestOutput, GuestProgram, ImageInfo, Incoming,
    MachineStatus, MemoryStand, MoveStand, NewMachine, News, Origin, PoolReport, SiteEvent,
    SiteReply, SiteRequest, StreamRequest, SubstrateInfo, UNKNOWN_GENERATION, Upload,
};

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

    /// Does what is asked and answers with the reply that belongs to the request.
    ///
    /// # Errors
    /// What the site refused, or that it could not be reached.
    async fn ask(&self, request: SiteRequest, call: Call) -> Result<SiteReply, Fault>;

    /// Opens a byte stream.
    ///
    /// # Errors
    /// What the site refused, or that it could not be reached.
    async fn open(&self, request: StreamRequest) -> Result<ByteStream, Fault>;
}

macro_rules! expect_reply {
    ($reply:expr, $variant:ident) => {
        match $reply {
            SiteReply::$variant(v) => Ok(v),
            other => Err(Fault::internal(format!(
                "the site answered {} where {} was due",
                other.label(),
                stringify!($variant)
            ))),
        }
    };
}

/// The requests by name, with the reply that each gives.
impl dyn SiteHost {
    /// What the site has now.
    ///
    /// # Errors
    /// As [`SiteHost::ask`]; so for all below.
    pub async fn report(&self) -> Result<SiteReport, Fault> {
        expect_reply!(self.ask(SiteRequest::Report, Call::quiet()).await?, Report)
    }

    /// The images that are there.
    ///
    /// # Errors
    /// As [`SiteHost::ask`].
    pub async fn images(&self) -> Result<Vec<ImageInfo>, Fault> {
        expect_reply!(self.ask(SiteRequest::Images, Call::quiet()).await?, Images)
    }

    /// The substrates that are there.
    ///
    /// # Errors
    /// As [`SiteHost::ask`].
    pub async fn substrates(&self) -> Result<Vec<SubstrateInfo>, Fault> {
        expect_reply!(self.ask(SiteRequest::Substrates, Call::quiet()).await?, Substrates)
    }

    /// The machines that the site knows, those that ended included.
    ///
    /// # Errors
    /// As [`SiteHost::ask`].
    pub async fn machines(&self) -> Result<Vec<MachineStatus>, Fault> {
        expect_reply!(self.ask(SiteRequest::Machines, Call::quiet()).await?, Machines)
    }

    /// Asks for something whose only answer is that it was done.
    ///
    /// # Errors
    /// As [`SiteHost::ask`].
    pub async fn tell(&self, request: SiteRequest, call: Call) -> Result<(), Fault> {
        match self.ask(request, call).await? {
            SiteReply::Done => Ok(()),
            other => Err(Fault::internal(format!(
                "the site answered {} where Done was due",
                other.label()
            ))),
        }
    }

    /// Builds an image.
    ///
    /// # Errors
    /// As [`SiteHost::ask`].
    pub async fn image_build(&self, name: Name, call: Call) -> Result<ImageInfo, Fault> {
        expect_reply!(self.ask(SiteRequest::ImageBuild { name }, call).await?, Image)
    }

    /// Makes a machine and starts it.
    ///
    /// # Errors
    /// As [`SiteHost::ask`].
    pub async fn vm_new(&self, new: NewMachine, call: Call) -> Result<MachineStatus, Fault> {
        expect_reply!(self.ask(SiteRequest::VmNew(new), call).await?, Machine)
    }

    /// Docks a machine.
    ///
    /// # Errors
    /// As [`SiteHost::ask`].
    pub async fn vm_dock(&self, request: SiteRequest, call: Call) -> Result<SubstrateInfo, Fault> {
        expect_reply!(self.ask(request, call).await?, Substrate)
    }
}
