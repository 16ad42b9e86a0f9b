//! Everything that we leave in the kernel and on the disk, by name and number, so that a restart finds it and `cleanup`
//! removes it. Numbers are upstream's where it has them (`API.md`).

use std::net::{Ipv4Addr, Ipv6Addr};

/// The overlay device: VXLAN in collect-metadata mode.
pub const OVERLAY: &str = "raven0";
/// The tunnel device: WireGuard, of the kernel or on a TUN device.
pub const TUNNEL: &str = "raven-wg0";

/// Key `vpn-connection-psk` of Secret `raven-agent-secret`, where the DaemonSet mounts it.
pub const PRESHARED_KEY_FILE: &str = "/etc/raven/secret/vpn-connection-psk";

/// Our routing table; nothing but remote prefixes lies in it.
pub const TABLE: u32 = 9027;
/// Our rule, before `main` (32766): everybody looks into [`TABLE`] first.
pub const RULE_PRIORITY: u32 = 100;
/// Protocol number of our routes and rules (`ip route show proto 152`): free in iproute2's rt_protos.
pub const ROUTE_PROTOCOL: u8 = 152;

/// Table of addresses of other pools' nodes, for kubelet ports alone.
pub const DETOUR_TABLE: u32 = 9029;
/// Rules that lead there, one per port: before [`RULE_PRIORITY`], so that L7 goes by L7's way.
pub const DETOUR_PRIORITY: u32 = 99;

/// Next hop of overlay routes: one entry in the neighbour table, however many destinations. Never seen on a wire.
pub const OVERLAY_NEXT_HOP4: Ipv4Addr = Ipv4Addr::new(169, 254, 200, 1);
/// The same for IPv6.
pub const OVERLAY_NEXT_HOP6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x72, 1);

/// BPF file system.
pub const BPFFS: &str = "/sys/fs/bpf";
/// Our pins. The number is the layout's version: a new layout never touches an old one's maps.
pub const PINS: &str = "/sys/fs/bpf/raven/v1";
/// TC priorities of our filters, where the kernel has no TCX (before 6.6): the first, because the verdict of whoever is asked before us
/// may be final; the second where a filter of another kind has that one. Filters of one priority (Cilium's are at 1, too) are told apart by
/// handle, and the newest is asked first.
pub const TC_PRIORITIES: [u16; 2] = [1, 4472];
/// See [`TC_PRIORITIES`].
pub const TC_HANDLE: u16 = 4472;

/// nftables table (family inet) with the exemption from source NAT.
pub const NFT_TABLE: &str = "raven";
/// kube-proxy's mark on packets that must be masqueraded (`--iptables-masquerade-bit` 14).
pub const KUBE_MASQUERADE_MARK: u32 = 0x4000;

/// Files that outlive the agent: key, last topology.
pub const STATE_DIR: &str = "/var/lib/raven";
/// The WireGuard private key, in [`STATE_DIR`].
pub const KEY_FILE: &str = "wireguard.key";
/// The last topology, in [`STATE_DIR`].
pub const SNAPSHOT_FILE: &str = "topology.json";
/// Keys and certificates of the proxy, in [`STATE_DIR`]: of a node that dials …
pub const PROXY_CLIENT_DIR: &str = "proxy.client";
/// … and of one that is dialled. As upstream has its folders.
pub const PROXY_SERVER_DIR: &str = "proxy.server";
