//! Verdicts of the eBPF programs: part of the key of `COUNTERS`, and a label of the metrics.
//! Numbers are never reused, because they are part of the layout of pinned maps.

macro_rules! verdicts {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        /// Action that a program took for a packet, with the reason for a drop.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Verdict {
            $($(#[$doc])* $name = $number,)*
        }

        impl Verdict {
            /// All verdicts, ordered by number.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Returns the stable name used in metrics and tables.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// Returns the verdict with this number, or `None` if no verdict has it.
            pub fn from_number(number: u32) -> Option<Self> {
                Self::ALL.iter().copied().find(|v| *v as u32 == number)
            }
        }
    };
}

verdicts! {
    /// `overlay_egress` on a member: the packet has its tunnel key and is sent to the pool's gateway node.
    Encapsulated = 0, "encapsulated";
    /// `uplink_ingress`: a packet unwrapped by XDP was redirected into the tunnel (fast tier).
    ToTunnelFast = 1, "to-tunnel-fast";
    /// `overlay_ingress`: the packet was redirected from `raven0` into the tunnel (fallback tier).
    ToTunnel = 2, "to-tunnel";
    /// `tunnel_ingress`: the packet was wrapped in place and sent to the node of this pool that has the destination.
    ToOverlay = 3, "to-overlay";
    /// `tunnel_ingress`: as [`Self::ToOverlay`], but by a tunnel key on `raven0`, because wrapping in place failed.
    ToOverlayKey = 4, "to-overlay-key";
    /// `tunnel_ingress`: the packet was relayed from one pool's tunnel into a third pool's.
    Relayed = 5, "relayed";
    /// The packet was passed to this node's stack, because the destination is on this node.
    Delivered = 6, "delivered";
    /// `tunnel_egress`: a packet of this node entered the tunnel through the stack.
    FromStack = 7, "from-stack";
    /// `overlay_egress`, `tunnel_egress`: link-local multicast of the kernel (MLD, on every new device) was discarded. Not counted
    /// as a drop.
    Multicast = 8, "multicast";
    /// `overlay_ingress`: a packet from a node of this pool to a kubelet of another pool was passed to
    /// this node's proxy.
    ToProxy = 9, "to-proxy";
    /// `tunnel_ingress` in a pool with encryption: a packet of a node of this pool was sent on to another pool.
    FromMember = 10, "from-member";
    /// `tunnel_ingress` in a pool with encryption: a packet from another pool was sent on to the node of this pool that has
    /// the destination.
    ToMember = 11, "to-member";

    /// To the stack: TTL or hop limit is exhausted; the stack answers with an ICMP error.
    StackTtl = 16, "stack-ttl";
    /// To the stack: the packet exceeds the tunnel's MTU; the stack answers with an ICMP error that contains the MTU.
    StackTooBig = 17, "stack-too-big";
    /// To the stack: this kernel cannot redirect a packet with tunnel metadata safely, or no tunnel is configured.
    StackNoRedirect = 18, "stack-no-redirect";
    /// To the stack: a kernel helper failed to rewrite the packet.
    StackRewriteFailed = 19, "stack-rewrite-failed";
    /// To the stack: the destination of an overlay packet is in no remote prefix.
    StackNotRemote = 20, "stack-not-remote";

    /// Dropped: neither IPv4 nor IPv6, for example ARP, which the overlay does not need.
    DropNotIp = 32, "drop-not-ip";
    /// Dropped: headers are truncated or inconsistent.
    DropMalformed = 33, "drop-malformed";
    /// Dropped: the outer source of an overlay packet is not a node of this pool.
    DropOuterNotInPool = 34, "drop-outer-not-in-pool";
    /// Dropped: the sender of an overlay packet is not a gateway node, and this node accepts only those.
    DropNotFromGateway = 35, "drop-not-from-gateway";
    /// Dropped: the sending node does not own the inner source.
    DropSpoofedInner = 36, "drop-spoofed-inner";
    /// Dropped: the source of a packet from the tunnel is in no remote prefix.
    DropSourceNotRemote = 37, "drop-source-not-remote";
    /// Dropped: no pool has a prefix for the destination.
    DropNoRoute = 38, "drop-no-route";
    /// Dropped: this pool has no gateway node for the destination.
    DropNoGateway = 39, "drop-no-gateway";
    /// Dropped: a relay would send the packet back to the pool it came from.
    DropRelayLoop = 40, "drop-relay-loop";
    /// Dropped: an overlay packet has a different VXLAN network identifier.
    DropWrongVni = 41, "drop-wrong-vni";
    /// Dropped: the source of an outgoing packet is not in this node's prefixes; the most likely cause is
    /// a CNI that masquerades.
    DropSourceNotMine = 42, "drop-source-not-mine";
    /// Dropped: an overlay packet has no tunnel metadata; `raven0` is not in collect-metadata mode.
    DropNoTunnelKey = 43, "drop-no-tunnel-key";
    /// Dropped by the guard: type and length of a packet to the tunnel's port match no WireGuard message.
    DropNotWireguard = 44, "drop-not-wireguard";
    /// Dropped by the guard: handshake initiations from one address exceed the rate limit.
    DropHandshakeFlood = 45, "drop-handshake-flood";
    /// Dropped by the guard: the MAC of a handshake initiation is not made with this node's public key. The sender is no
    /// peer, or knows another key of this node.
    DropWrongKey = 46, "drop-wrong-key";
    /// Dropped: this pool has encryption, and an overlay packet is not encrypted. The sender's agent has not
    /// applied the setting yet or is of an older release, or the packet is forged.
    DropNotEncrypted = 47, "drop-not-encrypted";
}

impl Verdict {
    /// Reports whether the packet was dropped.
    pub const fn is_drop(self) -> bool {
        self as u32 >= Self::DropNotIp as u32
    }

    /// Reports whether the packet took the slow path through the stack.
    pub const fn is_stack(self) -> bool {
        self as u32 >= Self::StackTtl as u32 && !self.is_drop()
    }
}
