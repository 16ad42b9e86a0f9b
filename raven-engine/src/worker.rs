//! The loop of one core: packets from its TUN queue to peers, and messages from its sockets to the TUN device.

use std::{
    io,
    os::fd::AsFd,
    sync::{Arc, atomic::Ordering, mpsc},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use gotatun::packet::{Packet, WgKind};
use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        eventfd::EventFd,
    },
};

use crate::{
    device::{Config, Device, Lost},
    guard::Verdict,
    offload::{self, Coalescer},
    peer::{Encrypted, Peer, Received},
    tun::{self, Queue},
    udp::{self, Endpoint, Outbox, Sockets, UdpSocket},
};

/// Packets that a worker takes from one source before it looks at the others.
const BATCH: usize = 128;

/// How long a worker goes on with packets that keep arriving after an order to change its sockets or to end.
const FINISH: Duration = Duration::from_millis(500);

/// Events: which file is ready.
const TUN: u64 = 0;
const V4: u64 = 1;
const V6: u64 = 2;
const WAKE: u64 = 3;

/// An order to a worker.
#[derive(Clone)]
pub(crate) enum Order {
    /// Use other sockets.
    Sockets(Arc<Sockets>),
    /// Send what is there, and end.
    Stop,
}

/// One worker.
pub(crate) struct Worker {
    device: Arc<Device>,
    queue: Queue,
    sockets: Option<Arc<Sockets>>,
    orders: mpsc::Receiver<Order>,
    wake: Arc<EventFd>,
    epoll: Epoll,
    pending: Pending,
    tun_buffer: Box<[u8]>,
    udp_buffer: Box<[u8]>,
}

/// What a worker writes when it has read a batch.
struct Pending {
    /// For the TUN device.
    coalescer: Coalescer,
    /// For peers.
    outbox: Outbox,
}

/// The other end of a worker.
pub(crate) struct Handle {
    orders: mpsc::Sender<Order>,
    wake: Arc<EventFd>,
}

impl Handle {
    /// Gives an order. If the worker has ended, nothing happens.
    pub(crate) fn order(&self, order: Order) {
        let _ = self.orders.send(order);
        let _ = self.wake.write(1);
    }
}

impl Worker {
    pub(crate) fn new(device: Arc<Device>, queue: Queue, udp: bool) -> io::Result<(Self, Handle)> {
        let (sender, orders) = mpsc::channel();
        let wake = Arc::new(EventFd::new()?);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(queue.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, TUN))?;
        epoll.add(wake.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, WAKE))?;
        let handle = Handle { orders: sender, wake: wake.clone() };
        let worker = Self {
            device,
            queue,
            sockets: None,
            orders,
            wake,
            epoll,
            pending: Pending { coalescer: Coalescer::new(udp), outbox: Outbox::default() },
            tun_buffer: vec![0; tun::BUFFER].into(),
            udp_buffer: vec![0; udp::BUFFER].into(),
        };
        Ok((worker, handle))
    }

    /// Works until it is stopped, or until the TUN device is deleted (an error).
    pub(crate) fn run(mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); 4];
        loop {
            let ready = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                ready => ready?,
            };
            for event in &events[..ready] {
                match event.data() {
                    TUN => _ = self.outbound()?,
                    V4 | V6 => _ = self.inbound(event.data()),
                    _ => {
                        self.wake.read()?;
                        if !self.follow_orders()? {
                            return self.finish();
                        }
                    }
                }
            }
        }
    }

    /// Follows the orders that wait. False: to end.
    fn follow_orders(&mut self) -> io::Result<bool> {
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Stop => return Ok(false),
                Order::Sockets(new) => self.change_sockets(new)?,
            }
        }
        Ok(true)
    }

    /// Packets that the node or its peers have already sent are not lost.
    fn finish(mut self) -> io::Result<()> {
        let end = Instant::now() + FINISH;
        loop {
            // Not "or", which would look at the sockets only when the TUN queue is empty.
            let is_left = [self.outbound()?, self.inbound(V4), self.inbound(V6)];
            if !is_left.contains(&true) || Instant::now() >= end {
                return Ok(());
            }
        }
    }

    fn change_sockets(&mut self, new: Arc<Sockets>) -> io::Result<()> {
        let end = Instant::now() + FINISH;
        while [self.inbound(V4), self.inbound(V6)].contains(&true) && Instant::now() < end {}
        if let Some(old) = &self.sockets {
            for socket in old.all() {
                self.epoll.delete(socket.as_fd())?;
            }
        }
        self.epoll.add(new.v4.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, V4))?;
        if let Some(v6) = &new.v6 {
            self.epoll.add(v6.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, V6))?;
        }
        self.sockets = Some(new);
        Ok(())
    }

    /// A batch from the TUN device to the peers. False: nothing is left.
    fn outbound(&mut self) -> io::Result<bool> {
        let device = self.device.clone();
        let config = device.config();
        let mtu = device.mtu.load(Ordering::Relaxed);
        let mut taken = 0;
        let mut is_left = true;
        while taken < BATCH {
            let (header, packet) = match self.queue.read(&mut self.tun_buffer) {
                Ok(Some(read)) => read,
                Ok(None) => {
                    is_left = false;
                    break;
                }
                Err(e) if tun::is_deleted(&e) => return Err(e),
                // The kernel could not describe a packet, and dropped it.
                Err(_) => (None, &mut [][..]),
            };
            let destination = offload::addresses(packet).map(|(_, destination)| destination);
            let is_ready = config.identity.is_some() && self.sockets.is_some();
            let Some(peer) = destination.filter(|_| is_ready).and_then(|address| config.route(address)) else {
                Lost::count(&device.lost.no_peer, 1);
                taken += 1;
                continue;
            };
            let outbox = &mut self.pending.outbox;
            let divided = header.ok_or(offload::Malformed).and_then(|header| {
                offload::split(header, packet, mtu, |packet| {
                    taken += 1;
                    send(&device, &config, outbox, peer, packet);
                })
            });
            if divided.is_err() {
                Lost::count(&device.lost.malformed, 1);
                taken += 1;
            }
        }
        // Sending may wait; others must not wait for it.
        drop(config);
        if let Some(sockets) = &self.sockets {
            Lost::count(&device.lost.not_sent, self.pending.outbox.flush(sockets));
        }
        Ok(is_left)
    }

    /// A batch from a socket to the TUN device. False: nothing is left.
    fn inbound(&mut self, which: u64) -> bool {
        let Some(sockets) = self.sockets.clone() else { return false };
        let Some(socket) = (if which == V4 { Some(&sockets.v4) } else { sockets.v6.as_ref() }) else { return false };
        let device = self.device.clone();
        let is_left = self.receive(&device, socket);
        Lost::count(&device.lost.not_sent, self.pending.outbox.flush(&sockets));
        let (queue, lost) = (&mut self.queue, &device.lost.not_delivered);
        // A device that is down takes no packets.
        self.pending.coalescer.drain(|parts| {
            if queue.write(parts).is_err() {
                Lost::count(lost, 1);
            }
        });
        is_left
    }

    /// Decrypts a batch. False: nothing is left.
    fn receive(&mut self, device: &Device, socket: &UdpSocket) -> bool {
        let config = device.config();
        // Messages of one sender come together, so the last session is remembered.
        let mut last: Option<(u32, Arc<Peer>)> = None;
        let mut taken = 0;
        while taken < BATCH {
            let Some((from, bytes, length)) = socket.receive(&mut self.udp_buffer) else { return false };
            // An empty datagram counts, too.
            taken += bytes.len().div_ceil(length).max(1);
            for datagram in bytes.chunks(length) {
                let Some(identity) = &config.identity else { continue };
                let datagram = Packet::from_bytes(BytesMut::from(datagram));
                let message = match identity.guard.check(from.remote, datagram) {
                    Verdict::Accept(message) => message,
                    Verdict::Reply(reply) => {
                        self.pending.outbox.push(from, bytes_of(reply));
                        continue;
                    }
                    Verdict::Drop => continue,
                };
                let index = match &message {
                    WgKind::Data(data) => Some(data.header.receiver_idx.get()),
                    _ => None,
                };
                let known = last.as_ref().filter(|(session, _)| Some(*session) == index);
                let peer = match known {
                    Some((_, peer)) => peer.clone(),
                    None => match device.recipient(&config, &message) {
                        Some(peer) => peer,
                        None => continue,
                    },
                };
                let received = peer.receive(message, from);
                self.pending.add(device, &config, &peer, from, received);
                if let Some(index) = index {
                    last = Some((index, peer));
                }
            }
        }
        true
    }
}

impl Pending {
    /// Adds what a message of a peer caused.
    fn add(&mut self, device: &Device, config: &Config, peer: &Arc<Peer>, from: Endpoint, received: Received) {
        for reply in received.replies {
            device.register(config, &reply, peer);
            self.outbox.push(from, bytes_of(reply));
        }
        // A keepalive is empty. Anything else that is not IP is an error of the peer.
        let Some(mut packet) = received.packet else { return };
        let Some(length) = offload::stated_length(&packet) else { return };
        packet.truncate(length);
        let source = offload::addresses(&packet).map(|(source, _)| source);
        let owner = source.and_then(|address| config.route(address));
        if owner.is_some_and(|owner| Arc::ptr_eq(owner, peer)) {
            self.coalescer.push(packet);
        } else {
            Lost::count(&device.lost.wrong_source, 1);
        }
    }
}

/// Encrypts a packet for a peer.
fn send(device: &Device, config: &Config, outbox: &mut Outbox, peer: &Arc<Peer>, packet: BytesMut) {
    match peer.encrypt(packet) {
        Encrypted::Send(message, endpoint) => {
            device.register(config, &message, peer);
            outbox.push(endpoint, bytes_of(message));
        }
        Encrypted::Waits => {}
        Encrypted::NoEndpoint => Lost::count(&device.lost.no_endpoint, 1),
    }
}

/// The bytes of a message.
pub(crate) fn bytes_of(message: WgKind) -> BytesMut {
    let mut packet: Packet = message.into();
    std::mem::take(packet.buf_mut())
}
