//! Real devices for what a test run cannot show. The node under test is in one namespace (uplink, `raven0`,
//! `raven-wg0` as a TUN device, with programs attached); its pool's LAN is in another one, where the test
//! sends and receives frames.

use std::{
    array,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    ifaddrs::getifaddrs,
    net::if_::if_nametoindex,
    sys::{
        socket::{
            AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvfrom, sendto, setsockopt, socket,
            sockopt::ReceiveTimeout,
        },
        time::TimeVal,
    },
};
use raven_agent::bpf::Hook;
use raven_common::{OVERLAY_MAC, OVERLAY_OVERHEAD, tables::Config};
use raven_tests::Namespace;
use tun_rs::{DeviceBuilder, SyncDevice};

use crate::{
    case::{difference, hex_difference},
    dataplane::{Counters, Dataplane},
    packet::{LAN_MAC, Overlay, UPLINK_MAC},
};

/// Time limit for an expected packet or count, which only a failing test reaches.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The node under test with its programs, and its LAN.
pub(crate) struct Testbed {
    /// Object that is attached on the node.
    pub dataplane: Dataplane,
    /// The TUN device `raven-wg0`, on the side of the encryption.
    tun: SyncDevice,
    /// Link-layer addresses for sending into `raven-wg0`: IPv4, IPv6.
    into_tunnel: [LinkAddr; 2],
    node: Namespace,
    lan: Namespace,
}

impl Testbed {
    /// Creates the namespaces. Replaces interface indexes in `config` by the real ones, unless they are zero.
    pub(crate) fn new(config: Config, hooks: &[Hook], mtu: u32) -> Self {
        let [node, lan] = ["node", "lan"].map(namespace);
        node.ip(&format!(
            "link add uplink mtu {mtu} address {uplink} type veth peer name lan mtu {mtu} address {lan_mac} netns {lan}
             link set lo up
             address add 10.0.0.11/24 dev uplink
             link set uplink up
             link add raven0 address {overlay} type vxlan external dstport 4472
             link set raven0 mtu {inner}
             link set raven0 up
             neigh add 10.0.0.10 lladdr {lan_mac} dev uplink nud permanent
             neigh add 10.0.0.12 lladdr {lan_mac} dev uplink nud permanent",
            uplink = text(UPLINK_MAC),
            lan_mac = text(LAN_MAC),
            overlay = text(OVERLAY_MAC),
            lan = lan.name,
            inner = mtu - OVERLAY_OVERHEAD as u32,
        ))
        .expect("create the node's devices");
        lan.ip("link set lan up").expect("set up the LAN's device");
        let tun = node
            .within(|| DeviceBuilder::new().name("raven-wg0").build_sync())
            .expect("enter the namespace")
            .expect("create the TUN device");
        node.ip(&format!("link set raven-wg0 mtu {mtu}\nlink set raven-wg0 up")).expect("set up the TUN device");
        let into_tunnel = node
            .within(|| Port::open("raven-wg0"))
            .map(|port| link_addresses(&tun, &port))
            .expect("enter the namespace");
        let hooks = hooks.to_vec();
        let dataplane = node.within(move || attached(config, &hooks)).expect("enter the namespace");
        Self { dataplane, tun, into_tunnel, node, lan }
    }

    /// Injects a decrypted packet into `raven-wg0`.
    pub(crate) fn decrypted(&self, packet: &[u8]) {
        assert_eq!(self.tun.send(packet).expect("write to the TUN device"), packet.len());
    }

    /// Sends a packet from `raven-wg0`, as the node's stack does.
    pub(crate) fn send_into_tunnel(&self, packet: &[u8]) {
        let address = self.into_tunnel[usize::from(packet[0] >> 4 == 6)];
        let port = self.on_node("raven-wg0");
        sendto(port.socket.as_raw_fd(), packet, &address, MsgFlags::empty()).expect("send into the tunnel");
    }

    /// Opens a port on a device of the node.
    pub(crate) fn on_node(&self, device: &'static str) -> Port {
        self.node.within(move || Port::open(device)).expect("enter the namespace")
    }

    /// Opens a port on the pool's LAN.
    pub(crate) fn on_lan(&self) -> Port {
        self.lan.within(|| Port::open("lan")).expect("enter the namespace")
    }

    /// Returns a sender on the LAN, which sends to the node as other nodes do.
    pub(crate) fn lan_sender(&self) -> Sender {
        self.lan.within(|| Sender::open("lan")).expect("enter the namespace")
    }

    /// Returns a sender on `raven0`, which sends as the node's stack does.
    pub(crate) fn overlay_sender(&self) -> Sender {
        self.node.within(|| Sender::open("raven0")).expect("enter the namespace")
    }

    /// Runs `act` and returns the increase of the counters. Waits until something is counted and two consecutive reads
    /// are equal, because packets and bytes are not updated atomically.
    pub(crate) fn counted(&self, what: &str, act: impl FnOnce()) -> Counters {
        let before = self.dataplane.counters();
        act();
        let end = Instant::now() + TIMEOUT;
        let mut last = Counters::new();
        loop {
            let counted = difference(&before, &self.dataplane.counters());
            if !counted.is_empty() && counted == last {
                return counted;
            }
            last = counted;
            assert!(Instant::now() < end, "{what}: nothing was counted within {TIMEOUT:?}");
            std::thread::yield_now();
        }
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        for ns in [&self.node, &self.lan] {
            delete(&ns.name);
        }
    }
}

/// Loads the object and attaches the programs. Must run on a thread in the node's namespace.
fn attached(config: Config, hooks: &[Hook]) -> Dataplane {
    let real =
        |device: &str, given: u32| if given == 0 { 0 } else { if_nametoindex(device).expect("the device exists") };
    let mut dataplane = Dataplane::load(Config {
        uplink_ifindex: real("uplink", config.uplink_ifindex),
        overlay_ifindex: real("raven0", config.overlay_ifindex),
        tunnel_ifindex: real("raven-wg0", config.tunnel_ifindex),
        ..config
    });
    for hook in hooks {
        let device = match hook {
            Hook::OverlayEgress | Hook::OverlayIngress => "raven0",
            Hook::UplinkXdp | Hook::UplinkIngress => "uplink",
            Hook::TunnelIngress | Hook::TunnelEgress => "raven-wg0",
        };
        dataplane.attach(*hook, device);
    }
    dataplane
}

/// Returns the link-layer addresses of a device without Ethernet, one per family. Without `unsafe`, they can only be
/// obtained from the kernel, by receiving two packets from the device.
fn link_addresses(tun: &SyncDevice, port: &Port) -> [LinkAddr; 2] {
    let packets = [[0x45; 60], [0x60; 60]];
    array::from_fn(|family| {
        assert_eq!(tun.send(&packets[family]).expect("write to the TUN device"), 60);
        port.receive("a packet of the TUN device").1
    })
}

/// A packet socket that receives and sends whole frames on a device.
pub(crate) struct Port {
    device: &'static str,
    index: usize,
    socket: OwnedFd,
}

impl Port {
    /// Opens a port in the current thread's namespace.
    fn open(device: &'static str) -> Self {
        let index = if_nametoindex(device).expect("the device exists") as usize;
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
            .expect("open a packet socket");
        setsockopt(&socket, ReceiveTimeout, &TimeVal::new(TIMEOUT.as_secs() as i64, 0))
            .expect("set the receive timeout");
        Self { device, index, socket }
    }

    /// Returns the next frame of the device.
    pub(crate) fn next(&self, what: &str) -> Vec<u8> {
        self.receive(what).0
    }

    fn receive(&self, what: &str) -> (Vec<u8>, LinkAddr) {
        let mut frame = vec![0; 1 << 16];
        loop {
            let (len, address) = recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut frame)
                .unwrap_or_else(|e| panic!("{what}: no frame on {} within {TIMEOUT:?}: {e}", self.device));
            let address = address.expect("the frame has a link-layer address");
            // The socket receives the frames of all devices in its namespace.
            if address.ifindex() == self.index {
                frame.truncate(len);
                return (frame, address);
            }
        }
    }

    /// Returns all frames received so far.
    pub(crate) fn drain(&self) -> Vec<Vec<u8>> {
        let flags = OFlag::from_bits_retain(fcntl(&self.socket, FcntlArg::F_GETFL).expect("get the socket's flags"));
        let set = |flags| fcntl(&self.socket, FcntlArg::F_SETFL(flags)).expect("set the socket's flags");
        set(flags | OFlag::O_NONBLOCK);
        let mut frame = vec![0; 1 << 16];
        let mut frames = Vec::new();
        while let Ok((len, address)) = recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut frame) {
            if address.is_some_and(|address| address.ifindex() == self.index) {
                frames.push(frame[..len].to_vec());
            }
        }
        set(flags);
        frames
    }

    /// Fails unless the next frame equals `frame`. This also shows that no other frame was sent before.
    pub(crate) fn expect(&self, what: &str, frame: &[u8]) {
        let difference = hex_difference("frame", frame, &self.next(what));
        assert!(difference.is_empty(), "{what}: on {}:\n{difference}", self.device);
    }

    /// Fails unless the next frame equals `overlay`, except for its outer source port, which is returned.
    pub(crate) fn expect_overlay(&self, what: &str, overlay: &Overlay) -> u16 {
        let seen = self.next(what);
        let port = seen.get(34..36).map_or(0, |p| u16::from_be_bytes([p[0], p[1]]));
        let expected = Overlay { ports: [port, overlay.ports[1]], ..overlay.clone() }.frame();
        let difference = hex_difference("frame", &expected, &seen);
        assert!(difference.is_empty(), "{what}: on {}:\n{difference}", self.device);
        port
    }
}

/// Sends frames on an Ethernet device.
pub(crate) struct Sender {
    socket: OwnedFd,
    address: LinkAddr,
}

impl Sender {
    fn open(device: &str) -> Self {
        let index = if_nametoindex(device).expect("the device exists") as usize;
        let addresses = getifaddrs().expect("list the addresses").filter_map(|i| i.address);
        let address = addresses
            .filter_map(|a| a.as_link_addr().copied())
            .find(|a| a.ifindex() == index)
            .expect("the device has a MAC address");
        // Without a protocol, the socket receives nothing.
        let socket =
            socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None).expect("open a packet socket");
        Self { socket, address }
    }

    /// Sends a frame.
    pub(crate) fn send(&self, frame: &[u8]) {
        assert_eq!(self.try_send(frame), Ok(frame.len()), "send the frame");
    }

    /// Sends a frame that a program of the device must drop, which the kernel reports as ENOBUFS.
    pub(crate) fn send_dropped(&self, frame: &[u8]) {
        assert_eq!(self.try_send(frame), Err(Errno::ENOBUFS), "the device's program must drop the frame");
    }

    fn try_send(&self, frame: &[u8]) -> nix::Result<usize> {
        sendto(self.socket.as_raw_fd(), frame, &self.address, MsgFlags::empty())
    }
}

/// Creates a namespace with IPv6 disabled, so that the devices carry only the test's packets.
fn namespace(role: &str) -> Namespace {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    sweep();
    let name = format!("rvp-{}-{}-{role}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let created = Command::new("ip").args(["netns", "add", &name]).status().expect("run ip");
    assert!(created.success(), "ip netns add {name}: {created}");
    let ns = Namespace { name, mount: None };
    ns.sh("for scope in all default; do echo 1 >/proc/sys/net/ipv6/conf/$scope/disable_ipv6; done")
        .expect("disable IPv6");
    ns
}

/// Deletes the namespaces of killed test processes.
fn sweep() {
    for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix("rvp-").and_then(|n| n.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            delete(&name);
        }
    }
}

fn delete(name: &str) {
    // Tests may sweep concurrently; an error means that another one has deleted the namespace.
    let _ = Command::new("ip").args(["netns", "del", name]).output();
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}
