//! The world that machines reach: a web server in a network namespace of its own.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::within;

/// A web server in a namespace that this host reaches by a link of its own; it serves `/etc`.
#[derive(Debug)]
pub struct World {
    namespace: String,
    server: Child,
    /// Where it listens, at port 80.
    pub address: String,
}

/// Whether a line of shell ends well.
fn works(line: &str) -> bool {
    Command::new("sh").args(["-c", line]).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
}

impl World {
    /// Starts one.
    #[must_use]
    #[allow(clippy::new_without_default, reason = "it starts processes")]
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (n, pid) = (NEXT.fetch_add(1, Ordering::Relaxed), std::process::id());
        let (namespace, link) = (format!("gwworld-{pid}-{n}"), format!("w{n}x{pid}"));
        let (net, at) = (pid / 64 % 256, 4 * ((pid + n) % 64));
        let (here, address) =
            (format!("198.18.{net}.{}", at + 1), format!("198.18.{net}.{}", at + 2));
        let made = works(&format!(
            "ip netns add {namespace} && \
             ip link add {link} type veth peer name eth0 netns {namespace} && \
             ip addr add {here}/30 dev {link} && ip link set {link} up && \
             ip -n {namespace} addr add {address}/30 dev eth0 && \
             ip -n {namespace} link set eth0 up && ip -n {namespace} link set lo up"
        ));
        assert!(made, "a namespace for the world");
        let server = Command::new("ip")
            .args(["netns", "exec", &namespace])
            .args(["python3", "-m", "http.server", "80", "-d", "/etc"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a web server");
        let asks = format!("ip netns exec {namespace} busybox nc -w 1 {address} 80 </dev/null");
        within(Duration::from_secs(20), "the web server", || works(&asks).then_some(()));
        Self { namespace, server, address }
    }
}

impl World {
    /// Has it be reached from this host at another address, too, for as long as it is there.
    pub fn also_at(&self, address: &str) {
        let made = works(&format!(
            "ip -n {} addr add {address}/32 dev lo && ip route add {address} via {}",
            self.namespace, self.address
        ));
        assert!(made, "a second address for the world");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        works(&format!("ip netns del {}", self.namespace));
    }
}
