//! A userspace WireGuard device for Linux, for nodes whose kernel has none.
//!
//! The protocol (handshakes, sessions, cookies) is gotatun's. This crate moves the packets: the kernel hands over
//! aggregates of up to 64 KiB on a TUN device with a virtio header, they are divided, encrypted and sent in runs that the
//! kernel or the network card divides again, and what arrives is joined before the kernel's stack sees it. One worker per
//! core has its own TUN queue and sockets; the kernel keeps a flow on one of them, so its packets keep their order (a flow may
//! change its queue when its other direction arrives at another worker).
//!
//! ```text
//!  TUN queue ─► offload ─► peer (encrypt) ─► outbox ─► UDP socket
//!  TUN queue ◄─ offload ◄─ peer (decrypt) ◄─ guard ◄─ UDP socket
//! ```
#![forbid(unsafe_code)]

mod device;
mod guard;
pub mod offload;
mod peer;
mod tun;
mod uapi;
mod udp;
mod worker;

use std::{
    io,
    os::unix::{fs::MetadataExt, net::UnixListener},
    sync::{Arc, atomic::Ordering, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

use gotatun::packet::WgKind;
use parking_lot::Mutex;

pub use crate::uapi::{SOCKETS, socket};
use crate::{
    device::Device,
    tun::Tun,
    udp::{Endpoint, Sockets},
    worker::{Handle, Order, Worker, bytes_of},
};

/// The time between two looks at the peers' timers, which have a resolution of a second.
const TICK: Duration = Duration::from_millis(250);

/// The number of ticks between two reports of dropped packets: a minute.
const REPORT: u32 = 240;

/// The engine cannot start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The TUN device cannot be opened.
    #[error("cannot open TUN device {0}: {1}")]
    Tun(String, io::Error),
    /// The configuration socket cannot be opened.
    #[error("cannot listen on the configuration socket of {0} in {SOCKETS}: {1}")]
    Socket(String, io::Error),
    /// A worker or its thread cannot be created.
    #[error("cannot start a worker: {0}")]
    Worker(io::Error),
    /// A worker ended.
    #[error("TUN device {0}: {1}; was the device deleted?")]
    Device(String, io::Error),
}

/// How to run a device.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Number of worker threads; one per core.
    pub workers: usize,
    /// Whether the TUN device stays when the engine ends, with its addresses, routes and programs. Without an engine it
    /// drops all packets. An existing device is used again in either case.
    pub persistent: bool,
}

/// A running device. Dropping it does not stop it.
pub struct Engine {
    shared: Arc<Shared>,
    ended: mpsc::Receiver<Result<(), Error>>,
}

/// Stops a device.
#[derive(Clone)]
pub struct Stop(Arc<Shared>);

/// What the threads of a device share.
struct Shared {
    name: String,
    device: Arc<Device>,
    tun: Tun,
    workers: Vec<Handle>,
    sockets: Mutex<Bound>,
}

/// The sockets in use.
#[derive(Default)]
struct Bound {
    /// 0: none yet.
    port: u16,
    mark: u32,
    sockets: Vec<Arc<Sockets>>,
}

impl Engine {
    /// Creates the TUN device, or opens an existing one, and starts its workers. The device is configured through its
    /// socket, with `wg` for instance, and is stopped when that socket is removed.
    pub fn start(name: &str, Options { workers, persistent }: Options) -> Result<Self, Error> {
        // Before the device, whose appearance others wait for.
        let listener = uapi::listen(name).map_err(|e| Error::Socket(name.to_owned(), e))?;
        let started = Self::start_on(listener, name, workers, persistent);
        if started.is_err() {
            let _ = std::fs::remove_file(socket(name));
        }
        started
    }

    fn start_on(listener: UnixListener, name: &str, workers: usize, persistent: bool) -> Result<Self, Error> {
        let tun_error = |e| Error::Tun(name.to_owned(), e);
        let (tun, queues) = Tun::open(name, workers, persistent).map_err(tun_error)?;
        let device = Arc::new(Device::new(tun.mtu().map_err(tun_error)?));
        let made = queues.into_iter().map(|queue| Worker::new(device.clone(), queue, tun.udp));
        let (workers, handles): (Vec<_>, Vec<_>) =
            made.collect::<io::Result<Vec<_>>>().map_err(Error::Worker)?.into_iter().unzip();
        let shared =
            Arc::new(Shared { name: name.to_owned(), device, tun, workers: handles, sockets: Mutex::default() });
        let (end, ended) = mpsc::channel();
        let mut threads = Vec::new();
        for worker in workers {
            let thread = thread::Builder::new().name("worker".to_owned());
            threads.push(thread.spawn(move || worker.run()).map_err(Error::Worker)?);
        }
        let listener = Arc::new(listener);
        let (for_clients, for_timer, to_shut_down) = (Arc::downgrade(&shared), shared.clone(), listener.clone());
        let clients = thread::spawn(move || uapi::serve(&listener, &for_clients));
        thread::spawn(move || {
            let result = for_timer.watch(threads);
            uapi::shut_down(&to_shut_down);
            let _ = clients.join();
            // Before `wait` returns: with the last reference, the device is closed.
            drop(for_timer);
            end.send(result)
        });
        Ok(Self { shared, ended })
    }

    /// A handle that stops this device.
    pub fn stopper(&self) -> Stop {
        Stop(self.shared.clone())
    }

    /// Waits until the device is stopped, or fails. Then it is closed, if no [`Stop`] is left.
    pub fn wait(self) -> Result<(), Error> {
        self.ended.recv().unwrap_or(Ok(()))
    }
}

impl Stop {
    /// Stops the device. Packets that it has accepted are still sent.
    pub fn stop(&self) {
        self.0.stop();
    }
}

impl Shared {
    fn stop(&self) {
        self.workers.iter().for_each(|worker| worker.order(Order::Stop));
    }

    /// Sends a message that no received packet caused.
    fn send(&self, message: WgKind, to: Endpoint) {
        let sockets = self.sockets.lock().sockets.first().cloned();
        if let Some(sockets) = sockets {
            sockets.send_one(&bytes_of(message), to);
        }
    }

    /// Changes the port (0: a free one) or the mark of outgoing packets, if they differ from the current ones. If the port
    /// is not available, the current sockets stay.
    fn change_sockets(&self, port: Option<u16>, mark: Option<u32>) -> io::Result<()> {
        let mut bound = self.sockets.lock();
        let mark = mark.unwrap_or(bound.mark);
        let Some(port) = port.filter(|port| bound.sockets.is_empty() || *port != bound.port) else {
            if mark != bound.mark {
                bound.sockets.iter().try_for_each(|sockets| sockets.set_mark(mark))?;
                bound.mark = mark;
            }
            return Ok(());
        };
        let (port, sockets) = Sockets::open(self.workers.len(), port, mark)?;
        let sockets: Vec<Arc<Sockets>> = sockets.into_iter().map(Arc::new).collect();
        for (worker, sockets) in self.workers.iter().zip(&sockets) {
            worker.order(Order::Sockets(sockets.clone()));
        }
        *bound = Bound { port, mark, sockets };
        Ok(())
    }

    /// Runs the timers until the workers end or the configuration socket is removed.
    fn watch(&self, threads: Vec<JoinHandle<io::Result<()>>>) -> Result<(), Error> {
        let inode = || std::fs::metadata(socket(&self.name)).map(|file| file.ino()).ok();
        let own = inode();
        let mut ticks: u32 = 0;
        while !threads.iter().any(JoinHandle::is_finished) {
            thread::sleep(TICK);
            self.device.tick(|message, to| self.send(message, to));
            if let Ok(mtu) = self.tun.mtu() {
                self.device.mtu.store(mtu, Ordering::Relaxed);
            }
            ticks += 1;
            if ticks.is_multiple_of(4)
                && let Some(identity) = &self.device.config().identity
            {
                identity.guard.next_second();
            }
            if ticks.is_multiple_of(REPORT) {
                self.device.lost.report(&self.name);
            }
            if inode() != own {
                self.stop();
            }
        }
        self.stop();
        self.device.lost.report(&self.name);
        let results = threads.into_iter().map(|thread| {
            let failed = |_| Err(io::Error::other("a worker panicked"));
            thread.join().unwrap_or_else(failed)
        });
        let result = results.collect::<io::Result<Vec<()>>>();
        if inode() == own {
            let _ = std::fs::remove_file(socket(&self.name));
        }
        result.map(drop).map_err(|e| Error::Device(self.name.clone(), e))
    }
}
