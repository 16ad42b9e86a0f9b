//! Impairs a link: adds delay and loss to a site's connection to the internet with a userspace forwarder, because the
//! development kernel has no netem.
//!
//! The site's port on the internet's bridge is replaced by a pair of devices. Two threads per direction carry frames
//! between them, each after a delay, or drop them. The devices do not aggregate packets, so frames have the size they
//! have on a wire.

use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrLike, bind, recvfrom, sendmsg,
    setsockopt, socket, sockopt::ReceiveTimeout,
};
use nix::sys::time::TimeVal;

use crate::{Lab, Namespace};

/// Receive timeout, after which a reader checks whether it should stop.
const STOP_CHECK_INTERVAL: TimeVal = TimeVal::new(0, 200_000);

/// `PACKET_OUTGOING` of linux/if_packet.h.
const OUTGOING: u8 = 4;

/// A running forwarder. Dropping it cuts the link.
#[derive(Debug)]
pub struct Impairment {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Lab {
    /// Adds `delay` in each direction to the link of a pool's site, and drops about one in `one_in` frames (0: none).
    pub fn impair(&self, pool: &str, delay: Duration, one_in: u64) -> Result<Impairment> {
        let pool = self.pool(pool);
        let (port, inet) = (&pool.spec.name, &self.site().inet);
        inet.ip(&format!("link set {port} nomaster\nlink add slow type veth peer name slow-far\nlink set slow master wire\nlink set slow up\nlink set slow-far up\n"))?;
        pool.router.run("ethtool", &["-K", "wan", "tso", "off", "gso", "off", "gro", "off", "tx", "off"])?;
        for device in [port, "slow", "slow-far"] {
            inet.run("ethtool", &["-K", device, "tso", "off", "gso", "off", "gro", "off", "tx", "off"])?;
        }
        let (near, far) = (Line::open(inet, port)?, Line::open(inet, "slow-far")?);
        let stop = Arc::new(AtomicBool::new(false));
        let threads = [(near.clone(), far.clone()), (far, near)].into_iter().enumerate();
        let threads =
            threads.flat_map(|(n, (from, to))| carry(from, to, delay, Loss::new(one_in, n as u64), &stop)).collect();
        Ok(Impairment { stop, threads })
    }
}

impl Drop for Impairment {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A device that is read and written frame by frame (packet(7)).
#[derive(Clone)]
struct Line(Arc<OwnedFd>);

impl Line {
    fn open(ns: &Namespace, device: &str) -> Result<Self> {
        let name = device.to_owned();
        let open = move || -> Result<OwnedFd> {
            let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), SockProtocol::EthAll)?;
            // getifaddrs returns the address in the form that a packet socket requires.
            let address = getifaddrs()?
                .filter(|found| found.interface_name == name)
                .find_map(|found| found.address.filter(|a| a.family() == Some(AddressFamily::Packet)))
                .and_then(|address| address.as_link_addr().copied());
            bind(socket.as_raw_fd(), &address.context("the device does not exist")?)?;
            setsockopt(&socket, ReceiveTimeout, &STOP_CHECK_INTERVAL)?;
            Ok(socket)
        };
        let socket = ns.within(open)?.with_context(|| format!("open {device} of {}", ns.name))?;
        Ok(Self(Arc::new(socket)))
    }
}

/// Selects about one in `one_in` frames by a hash of the frame's number, so that every run drops the same frames.
struct Loss {
    one_in: u64,
    number: u64,
}

impl Loss {
    fn new(one_in: u64, direction: u64) -> Self {
        Self { one_in, number: direction << 32 }
    }

    fn loses(&mut self) -> bool {
        // SplitMix64's finaliser.
        self.number += 1;
        let mut hash = self.number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        self.one_in > 0 && (hash ^ (hash >> 27)).is_multiple_of(self.one_in)
    }
}

fn carry(from: Line, to: Line, delay: Duration, mut loss: Loss, stop: &Arc<AtomicBool>) -> [JoinHandle<()>; 2] {
    let (queue, queued) = mpsc::channel::<(Instant, Vec<u8>)>();
    let stop = stop.clone();
    let read = std::thread::spawn(move || {
        let mut frame = vec![0; 1 << 16];
        while !stop.load(Ordering::Relaxed) {
            let Ok((length, Some(about))) = recvfrom::<LinkAddr>(from.0.as_raw_fd(), &mut frame) else { continue };
            // Frames that this forwarder sends to the device are received here too.
            if about.pkttype() != OUTGOING
                && !loss.loses()
                && queue.send((Instant::now() + delay, frame[..length].to_vec())).is_err()
            {
                return;
            }
        }
    });
    let write = std::thread::spawn(move || {
        // The sleep is the delay of the link.
        while let Ok((due, frame)) = queued.recv() {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let _ = sendmsg::<()>(to.0.as_raw_fd(), &[IoSlice::new(&frame)], &[], MsgFlags::empty(), None);
        }
    });
    [read, write]
}
