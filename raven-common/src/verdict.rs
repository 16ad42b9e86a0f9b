//! What a program did with a packet: the second half of the key of the `COUNTERS` map, the metric label, and the text
//! a person reads. Numbers are never reused: they are part of the pinned layout.

macro_rules! verdicts {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        /// See the module's text.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Verdict {
            $($(#[$doc])* $name = $number,)*
        }

        impl Verdict {
            /// Every verdict, in order of its number.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The stable name, as metrics and tables show it.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// The verdict with this number, if there is one.
            pub fn from_number(number: u32) -> Option<Self> {
                Self::ALL.iter().copied().find(|v| *v as u32 == number)
            }
        }
    };
}

verdicts! {
    /// `overlay_egress`, ordinary node: the packet got its tunnel key and leaves for the pool's gateway node.
    Encapsulated = 0, "encapsulated";
    /// `uplink_ingress`: what XDP unwrapped went straight into the tunnel (the fast tier).
    ToTunnelFast = 1, "to-tunnel-fast";
    /// `overlay_ingress`: from `raven0` into the tunnel (the fallback tier).
    ToTunnel = 2, "to-tunnel";
    /// `tunnel_ingress`: wrapped and sent to the pool's node that has the destination.
    ToOverlay = 3, "to-overlay";
    /// `tunnel_ingress`: the same by a tunnel key on `raven0`, where wrapping in place failed.
    ToOverlayKey = 4, "to-overlay-key";
    /// `tunnel_ingress`: from one pool's tunnel into a third pool's.
    Relayed = 5, "relayed";
    /// Handed to this node's own stack: the destination lives here.
    Delivered = 6, "delivered";
    /// `tunnel_egress`: this node's own packet entered the tunnel by way of the stack.
    FromStack = 7, "from-stack";
    /// `overlay_egress`: what the kernel says to neighbours (MLD, on every new device). Ends here, as nothing is lost: no drop.
    Multicast = 8, "multicast";
    /// `overlay_ingress`: from a node of this pool to a kubelet of another one; this node's proxy takes it.
    ToProxy = 9, "to-proxy";

    /// To the stack: TTL or hop limit is spent, the stack answers with an ICMP error.
    StackTtl = 16, "stack-ttl";
    /// To the stack: does not fit into the tunnel, the stack answers with the right MTU.
    StackTooBig = 17, "stack-too-big";
    /// To the stack: this kernel cannot take the redirect safely (EBPF.md, metadata dst), or it is not set up.
    StackNoRedirect = 18, "stack-no-redirect";
    /// To the stack: a helper refused to rewrite the packet.
    StackRewriteFailed = 19, "stack-rewrite-failed";
    /// To the stack: an overlay packet for nobody's remote prefix.
    StackNotRemote = 20, "stack-not-remote";

    /// Dropped: neither IPv4 nor IPv6 (ARP, say: the overlay needs none).
    DropNotIp = 32, "drop-not-ip";
    /// Dropped: headers cut short or contradicting each other.
    DropMalformed = 33, "drop-malformed";
    /// Dropped: an overlay packet from an outer address that is no node of this pool.
    DropOuterNotInPool = 34, "drop-outer-not-in-pool";
    /// Dropped: an overlay packet from a node that is no gateway node, on a node that takes them only from those.
    DropNotFromGateway = 35, "drop-not-from-gateway";
    /// Dropped: the inner source does not belong to the node that sent it.
    DropSpoofedInner = 36, "drop-spoofed-inner";
    /// Dropped: from the tunnel, with a source that no other pool has.
    DropSourceNotRemote = 37, "drop-source-not-remote";
    /// Dropped: no pool has the destination.
    DropNoRoute = 38, "drop-no-route";
    /// Dropped: the pool has no gateway node to send through.
    DropNoGateway = 39, "drop-no-gateway";
    /// Dropped: would go back to the pool that it came from.
    DropRelayLoop = 40, "drop-relay-loop";
    /// Dropped: an overlay packet with another network identifier.
    DropWrongVni = 41, "drop-wrong-vni";
    /// Dropped: on its way out with a source that is not of this node's prefixes: the CNI masqueraded it, most likely.
    DropSourceNotMine = 42, "drop-source-not-mine";
    /// Dropped: an overlay packet without tunnel metadata (`raven0` is not in collect-metadata mode).
    DropNoTunnelKey = 43, "drop-no-tunnel-key";
    /// Dropped at the guard: for the tunnel's port, and no WireGuard message by type and length.
    DropNotWireguard = 44, "drop-not-wireguard";
    /// Dropped at the guard: more handshake initiations from one address than any number of peers there would send.
    DropHandshakeFlood = 45, "drop-handshake-flood";
}

impl Verdict {
    /// True if the packet ended here and somebody may miss it.
    pub const fn is_drop(self) -> bool {
        self as u32 >= Self::DropNotIp as u32
    }

    /// True if the packet took the slow way, through the stack.
    pub const fn is_stack(self) -> bool {
        self as u32 >= Self::StackTtl as u32 && !self.is_drop()
    }
}
