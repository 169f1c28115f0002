//! A link that is up.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::LinkError;
use super::engine::{self, Shared};
use super::model::{Counters, Model, Side};
use super::netns::{Record, Within, enter, ip, ns_name, remove_namespaces, sweep};
use super::spec::{LaneSpec, LinkSpec};
use super::tun::{DEVICE, Tun};

/// Makes links.
#[derive(Debug)]
pub enum Link {}

/// A link that is up. Dropping it removes both namespaces and everything in them but processes,
/// which lose their network.
#[derive(Debug)]
pub struct LinkHandle {
    spec: LinkSpec,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    _record: Record,
}

impl Link {
    /// Makes both namespaces and starts to carry packets. Namespaces of this name that a killed
    /// emulator left behind are replaced, and those of other names cleared.
    ///
    /// # Errors
    /// [`LinkError`] for a bad spec, a name in use, or a refusal by the kernel (root is needed).
    /// Nothing is left behind then.
    pub fn create(spec: LinkSpec) -> Result<LinkHandle, LinkError> {
        spec.check()?;
        sweep()?;
        let record = Record::take(&spec.name)?;
        match start(&spec) {
            Ok((shared, thread)) => {
                Ok(LinkHandle { spec, shared, thread: Some(thread), _record: record })
            }
            Err(e) => {
                if let Err(left) = remove_namespaces(&spec.name) {
                    tracing::warn!(link = %spec.name, "could not clear a half-made link: {left}");
                }
                Err(e)
            }
        }
    }
}

fn start(spec: &LinkSpec) -> Result<(Arc<Shared>, JoinHandle<()>), LinkError> {
    let a = end(spec, Side::A, spec.addr_a)?;
    let b = end(spec, Side::B, spec.addr_b)?;
    let shared =
        Shared::new(Model::new(spec)).map_err(|e| LinkError::system("make an eventfd", e))?;
    let mtu = usize::from(spec.mtu);
    let thread = std::thread::Builder::new()
        .name(format!("link-{}", spec.name))
        .spawn({
            let shared = Arc::clone(&shared);
            move || engine::run(&shared, &a, &b, mtu)
        })
        .map_err(|e| LinkError::system("start the link's thread", e))?;
    Ok((shared, thread))
}

fn end(spec: &LinkSpec, side: Side, addr: Ipv4Addr) -> Result<Tun, LinkError> {
    let ns = &ns_name(&spec.name, side);
    ip(&["netns", "add", ns])?;
    let tun = enter(ns, Tun::create)?
        .map_err(|e| LinkError::system(format!("make a TUN device in {ns}"), e))?;
    ip(&["-n", ns, "link", "set", "lo", "up"])?;
    // Without an IPv6 address the kernel sends nothing of its own over the link.
    ip(&["-n", ns, "link", "set", DEVICE, "addrgenmode", "none"])?;
    ip(&["-n", ns, "addr", "add", &format!("{addr}/24"), "dev", DEVICE])?;
    let mtu = &spec.mtu.to_string();
    ip(&["-n", ns, "link", "set", DEVICE, "mtu", mtu, "txqueuelen", "2000", "up"])?;
    Ok(tun)
}

impl LinkHandle {
    /// The spec that the link was made from.
    #[must_use]
    pub const fn spec(&self) -> &LinkSpec {
        &self.spec
    }

    /// Name of the namespace on `side`, for `ip netns exec`.
    #[must_use]
    pub fn ns(&self, side: Side) -> String {
        ns_name(&self.spec.name, side)
    }

    /// Name of the namespace on side A.
    #[must_use]
    pub fn ns_a(&self) -> String {
        self.ns(Side::A)
    }

    /// Name of the namespace on side B.
    #[must_use]
    pub fn ns_b(&self) -> String {
        self.ns(Side::B)
    }

    /// Address of the end on `side`.
    #[must_use]
    pub const fn addr(&self, side: Side) -> Ipv4Addr {
        match side {
            Side::A => self.spec.addr_a,
            Side::B => self.spec.addr_b,
        }
    }

    /// Address of the end on side A.
    #[must_use]
    pub const fn addr_a(&self) -> Ipv4Addr {
        self.spec.addr_a
    }

    /// Address of the end on side B.
    #[must_use]
    pub const fn addr_b(&self) -> Ipv4Addr {
        self.spec.addr_b
    }

    /// A command that will run `program` inside the namespace on `side`.
    #[must_use]
    pub fn command(&self, side: Side, program: impl Into<PathBuf>) -> Command {
        let mut c = Command::new("ip");
        c.args(["netns", "exec", &self.ns(side)]).arg(program.into());
        c
    }

    /// Runs `f` on a thread of its own inside the namespace on `side`; sockets that it opens and
    /// processes that it starts stay there.
    ///
    /// # Errors
    /// [`LinkError::System`] when the namespace cannot be entered.
    pub fn enter<T: Send>(&self, side: Side, f: impl FnOnce() -> T + Send) -> Result<T, LinkError> {
        enter(&self.ns(side), f)
    }

    /// Makes `future` run inside the namespace on `side`: processes that it starts itself stay
    /// there, while the tasks it spawns run outside.
    ///
    /// # Errors
    /// [`LinkError::System`] when the namespace cannot be opened.
    pub fn within<F: Future>(&self, side: Side, future: F) -> Result<Within<F>, LinkError> {
        Within::new(&self.ns(side), future)
    }

    /// Cuts the link for `length`, or until [`LinkHandle::restore`]. Whatever is queued or in
    /// flight is lost, and so is what comes until the end.
    pub fn cut(&self, length: Option<Duration>) {
        self.shared.with(|m, now| m.cut(now, length));
    }

    /// Ends a cut.
    pub fn restore(&self) {
        self.shared.with(|m, now| m.restore(now));
    }

    /// Whether the link is cut now.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.shared.with(|m, now| m.is_cut(now))
    }

    /// Changes the direction that starts at `from`; what is queued goes on at the new rate.
    ///
    /// # Errors
    /// [`LinkError::Spec`] for a figure outside its range; nothing is changed then.
    pub fn set(&self, from: Side, lane: LaneSpec) -> Result<(), LinkError> {
        lane.check()?;
        self.shared.with(|m, now| m.set(now, from, lane));
        Ok(())
    }

    /// What the direction that starts at `from` is like now.
    #[must_use]
    pub fn lane(&self, from: Side) -> LaneSpec {
        self.shared.with(|m, _| m.lane(from))
    }

    /// The counters since the start.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.with(|m, _| m.counters())
    }
}

impl Drop for LinkHandle {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(link = %self.spec.name, "the link's thread ended in a panic");
        }
        if let Err(e) = remove_namespaces(&self.spec.name) {
            tracing::warn!(link = %self.spec.name, "could not remove the link's namespaces: {e}");
        }
    }
}
