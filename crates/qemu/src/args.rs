//! The command line of a machine.
//!
//! Two machines of equal specs get the same devices at the same addresses. What differs between
//! them (paths, sockets, the accelerator) is nothing that a guest can see.

use std::path::Path;

use godwit_types::Arch;
use serde_json::{Value, json};

use crate::launch::{Launch, MemorySource, Start, VmGenId};
use crate::machine::{RAM_BLOCK, RunPaths};
use crate::spec::{MachineSpec, Nic, NicBackend};

/// Listening sockets and TAPs that QEMU inherits, by number.
#[derive(Debug, Clone)]
pub(crate) struct Inherited {
    pub(crate) qmp: [i32; 2],
    pub(crate) console: i32,
    pub(crate) agent: i32,
    /// TAPs, each with the port of its NIC.
    pub(crate) taps: Vec<(u8, i32)>,
    /// And a library that lets it give memory back though it may only read the file (`discard`).
    pub(crate) discards: bool,
}

/// The name under which QEMU is handed the TAP of a NIC that is plugged while it runs.
pub(crate) fn tap_fd_name(port: u8) -> String {
    format!("tap{port}")
}

/// First slot of the spare NIC ports on the root bus.
const NIC_PORT_SLOT: u8 = 0x10;

/// Machine type with its fixed options, without anything of the host.
pub(crate) fn machine_option(spec: &MachineSpec) -> String {
    let extra = match spec.arch {
        Arch::X86_64 => "hpet=off,sata=off,smbus=off,vmport=off",
        Arch::Aarch64 => "gic-version=3,its=on,virtualization=off,secure=off",
    };
    format!("{},{extra},usb=off,graphics=on", spec.machine_type())
}

/// The devices that a spec asks for, as QEMU takes them, in order.
fn devices(spec: &MachineSpec, vmgenid: VmGenId) -> Vec<Value> {
    let mut all = Vec::new();
    if spec.display {
        all.push(json!({
            "driver": "VGA", "id": "vga", "bus": "pcie.0", "addr": "0x1", "vgamem_mb": 16,
        }));
    }
    if spec.disk {
        all.push(json!({
            "driver": "virtio-blk-pci", "id": "disk0", "bus": "pcie.0", "addr": "0x3",
            "drive": "top", "serial": "godwit-disk0", "num-queues": 1, "bootindex": 1,
        }));
    }
    all.push(json!({
        "driver": "virtio-rng-pci", "id": "rng0", "bus": "pcie.0", "addr": "0x4", "rng": "entropy0",
    }));
    all.push(json!({
        "driver": "virtio-balloon-pci", "id": "balloon0", "bus": "pcie.0", "addr": "0x5",
        "free-page-reporting": true, "deflate-on-oom": true,
    }));
    all.push(json!({
        "driver": "virtio-serial-pci", "id": "vserial0", "bus": "pcie.0", "addr": "0x6",
        "max_ports": 4,
    }));
    all.push(json!({
        "driver": "virtserialport", "id": "agent0", "bus": "vserial0.0", "nr": 1,
        "chardev": "agent", "name": "org.qemu.guest_agent.0",
    }));
    if spec.display {
        for (n, driver) in
            ["virtio-keyboard-pci", "virtio-tablet-pci", "virtio-multitouch-pci"].iter().enumerate()
        {
            all.push(json!({
                "driver": driver, "id": format!("input{n}"), "bus": "pcie.0",
                "addr": format!("{:#x}", 7 + n),
            }));
        }
    }
    if spec.arch == Arch::X86_64 {
        let guid = match vmgenid {
            VmGenId::Fresh => "auto".to_owned(),
            VmGenId::Keep(guid) => guid.to_string(),
        };
        all.push(json!({ "driver": "vmgenid", "id": "vmgenid0", "guid": guid }));
        all.push(json!({ "driver": "isa-serial", "id": "serial0", "chardev": "console" }));
    }
    for port in 0..spec.nic_ports {
        all.push(json!({
            "driver": "pcie-root-port", "id": format!("nicport{port}"), "bus": "pcie.0",
            "addr": format!("{:#x}", NIC_PORT_SLOT + port),
            "chassis": port + 1, "slot": port + 1,
        }));
    }
    all
}

/// Each device of `spec` as one line of a manifest: keys sorted, nothing of the host.
pub(crate) fn device_shape(spec: &MachineSpec) -> Vec<String> {
    devices(spec, VmGenId::Fresh)
        .iter()
        .map(|d| {
            let mut parts: Vec<String> = d
                .as_object()
                .into_iter()
                .flatten()
                .filter(|(k, _)| !matches!(k.as_str(), "chardev" | "drive" | "rng"))
                .map(|(k, v)| format!("{k}={}", v.as_str().map_or(v.to_string(), str::to_owned)))
                .collect();
            parts.sort();
            parts.join(",")
        })
        .collect()
}

/// The `netdev` and the `device` of a NIC; `tap` is what QEMU knows the descriptor of its TAP by.
pub(crate) fn nic(nic: &Nic, tap: &str) -> (Value, Value) {
    let id = format!("net{}", nic.port);
    let netdev = match &nic.backend {
        // Routers that lead nowhere are nothing to tell a guest of.
        NicBackend::Isolated => {
            json!({ "type": "user", "id": id, "restrict": true, "ipv6": false })
        }
        NicBackend::User => json!({ "type": "user", "id": id }),
        NicBackend::Tap(_) => json!({ "type": "tap", "id": id, "fd": tap, "vhost": false }),
    };
    let device = json!({
        "driver": "virtio-net-pci", "id": format!("nic{}", nic.port), "netdev": id,
        "bus": format!("nicport{}", nic.port), "addr": "0x0", "mac": nic.mac.to_string(),
        "romfile": "",
    });
    (netdev, device)
}

/// A value inside an option list, where a comma is written twice.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// The whole command line of `launch`, without the program.
///
/// `fds` are listening sockets and TAPs that QEMU inherits.
pub(crate) fn command_line(launch: &Launch, paths: &RunPaths, fds: &Inherited) -> Vec<String> {
    let spec = &launch.spec;
    let mut args: Vec<String> = Vec::new();
    let mut push = |option: &str, value: String| args.extend([option.to_owned(), value]);

    push("-name", format!("{},debug-threads=on", launch.name));
    push("-machine", format!("{},memory-backend={RAM_BLOCK}", machine_option(spec)));
    push("-cpu", spec.cpu_model().to_owned());
    push("-accel", launch.accel.option().to_owned());
    push("-m", format!("size={}M", spec.memory.0));
    push("-smp", format!("cpus={n},maxcpus={n}", n = spec.vcpus));
    push("-object", memory_object(spec, &launch.memory, fds.discards).to_string());
    push(
        "-object",
        json!({"qom-type": "rng-random", "id": "entropy0", "filename": "/dev/urandom"}).to_string(),
    );
    push("-kernel", spec.kernel.path.to_string_lossy().into_owned());
    if let Some(initrd) = &spec.initrd {
        push("-initrd", initrd.path.to_string_lossy().into_owned());
    }
    if !spec.cmdline.is_empty() {
        push("-append", spec.cmdline.clone());
    }
    push("-rtc", "base=utc,clock=host".to_owned());

    for (n, fd) in fds.qmp.iter().enumerate() {
        push("-chardev", format!("socket,id=qmp{n},fd={fd},server=on,wait=off"));
        push("-mon", format!("chardev=qmp{n},mode=control"));
    }
    push(
        "-chardev",
        format!(
            "socket,id=console,fd={},server=on,wait=off,logfile={},logappend=on",
            fds.console,
            escaped(&paths.console_log)
        ),
    );
    push("-chardev", format!("socket,id=agent,fd={},server=on,wait=off", fds.agent));
    if spec.arch == Arch::Aarch64 {
        push("-serial", "chardev:console".to_owned());
    }
    if let Some(disk) = &launch.disk {
        for node in disk.blockdevs() {
            push("-blockdev", node.to_string());
        }
    }
    for device in devices(spec, launch.vmgenid) {
        push("-device", device.to_string());
    }
    for plugged in &launch.nics {
        let tap = fds.taps.iter().find(|(port, _)| *port == plugged.port);
        let (netdev, device) = nic(plugged, &tap.map_or(String::new(), |(_, fd)| fd.to_string()));
        push("-netdev", netdev.to_string());
        push("-device", device.to_string());
    }
    if spec.display {
        let vnc = match launch.confine {
            Some(_) => &paths.vnc_made,
            None => &paths.vnc,
        };
        push("-vnc", format!("unix:{},share=force-shared", escaped(vnc)));
    }
    push(
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".to_owned(),
    );
    match launch.start {
        Start::Boot => args.push("-S".to_owned()),
        Start::Incoming => push("-incoming", "defer".to_owned()),
    }
    args.extend(
        ["-nodefaults", "-no-user-config", "-display", "none", "-msg", "timestamp=on"]
            .map(str::to_owned),
    );
    args
}

fn memory_object(spec: &MachineSpec, memory: &MemorySource, discards: bool) -> Value {
    let mut object = json!({
        "qom-type": "memory-backend-file", "id": RAM_BLOCK, "size": spec.memory.bytes(),
        "mem-path": memory.path().to_string_lossy(), "dump": false, "merge": false,
    });
    let more = match memory {
        MemorySource::Shared { .. } => json!({"share": true}),
        // Said to QEMU, read-only keeps it from giving memory back; the library opens it so.
        MemorySource::PrivateOf { .. } if discards => json!({"share": false}),
        MemorySource::PrivateOf { .. } => json!({"share": false, "readonly": true, "rom": "off"}),
    };
    if let (Some(object), Value::Object(more)) = (object.as_object_mut(), more) {
        object.extend(more);
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{DiskChain, Layer};
    use crate::spec::MacAddress;
    use crate::spec::tests::spec;

    const FDS: Inherited =
        Inherited { qmp: [7, 8], console: 9, agent: 10, taps: Vec::new(), discards: true };

    fn launch() -> Launch {
        Launch {
            disk: Some(DiskChain::over(vec![Layer::Raw { path: "/b,driver=x".into() }], "/t")),
            ..Launch::new(
                spec(),
                "/run/godwit/a".into(),
                "vm".parse().unwrap(),
                MemorySource::Shared { path: "/dev/shm/a".into() },
            )
        }
    }

    #[test]
    fn a_comma_in_a_path_stays_inside_its_value() {
        let paths = RunPaths::of(Path::new("/run/a,server=off"));
        let args = command_line(&launch(), &paths, &FDS);
        assert!(
            args.iter().any(|a| a.contains("logfile=/run/a,,server=off/console.log,logappend=on")),
            "{args:?}"
        );
        assert!(args.iter().any(|a| a.contains(r#""filename":"/b,driver=x""#)), "{args:?}");
    }

    #[test]
    fn source_and_destination_differ_only_in_what_no_guest_sees() {
        let here = launch();
        let mut there = launch();
        there.start = Start::Incoming;
        there.memory = MemorySource::PrivateOf { path: "/sealed".into() };
        let at = |l: &Launch, dir: &str| command_line(l, &RunPaths::of(Path::new(dir)), &FDS);
        let devices = |args: Vec<String>| -> Vec<String> {
            args.windows(2)
                .filter(|w| {
                    matches!(w[0].as_str(), "-device" | "-m" | "-smp" | "-machine" | "-cpu")
                })
                .map(|w| w[1].clone())
                .collect()
        };
        assert_eq!(devices(at(&here, "/run/a")), devices(at(&there, "/run/b")));
    }

    #[test]
    fn addresses_on_a_bus_are_used_once() {
        let mut seen = std::collections::HashSet::new();
        for d in devices(&spec(), VmGenId::Fresh) {
            if let Some(addr) = d["addr"].as_str() {
                assert!(seen.insert((d["bus"].to_string(), addr.to_owned())), "{d}");
            }
        }
    }

    #[test]
    fn a_nic_is_described_alike_for_hot_plug_and_for_the_command_line() {
        let n =
            Nic { port: 1, mac: MacAddress([0x52, 1, 2, 3, 4, 5]), backend: NicBackend::Isolated };
        let (netdev, device) = nic(&n, "");
        assert_eq!(netdev["restrict"], true);
        assert_eq!(device["bus"], "nicport1");
        assert_eq!(device["mac"], "52:01:02:03:04:05");
    }
}
