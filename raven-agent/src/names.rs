//! Names and numbers of everything that Raven leaves in the kernel and on the disk, so that a restarted agent finds it
//! and `cleanup` removes it. Where OpenYurt's Raven has a name or number for the same thing, it is the same here.

use std::net::{Ipv4Addr, Ipv6Addr};

/// The overlay device: VXLAN in collect-metadata mode.
pub const OVERLAY: &str = "raven0";
/// The tunnel device: WireGuard, in the kernel or on a TUN device.
pub const TUNNEL: &str = "raven-wg0";

/// File with key `vpn-connection-psk` of Secret `raven-agent-secret`, mounted by the DaemonSet.
pub const PRESHARED_KEY_FILE: &str = "/etc/raven/secret/vpn-connection-psk";

/// Raven's routing table; it contains remote prefixes only.
pub const TABLE: u32 = 9027;
/// Metric of the unreachable routes in [`TABLE`]: behind the routes to devices, whose metric is 0 (IPv4) or 1024 (IPv6).
pub const BARRIER_METRIC: u32 = 4096;
/// Priority of the rule for [`TABLE`]: before `main` (32766), so that every lookup consults Raven's table first.
pub const RULE_PRIORITY: u32 = 100;
/// Protocol number of Raven's routes and rules (`ip route show proto 152`); unassigned in iproute2's rt_protos.
pub const ROUTE_PROTOCOL: u8 = 152;

/// Routing table of the interception: addresses of edge nodes, for kubelet ports only.
pub const INTERCEPTION_TABLE: u32 = 9029;
/// The same for proxies of other exposed pools, for the ports of the proxies' Service only: a table of its own, because
/// these nodes' kubelets are not intercepted.
pub const PROXIES_TABLE: u32 = 9030;
/// Priority of the rules for both tables, one per port: before [`RULE_PRIORITY`], so that kubelet
/// connections use the proxy and not the tunnel.
pub const INTERCEPTION_PRIORITY: u32 = 99;

/// Next hop of IPv4 overlay routes, so that all destinations share one entry of the neighbour table. It never appears
/// on a wire.
pub const OVERLAY_NEXT_HOP4: Ipv4Addr = Ipv4Addr::new(169, 254, 200, 1);
/// Next hop of IPv6 overlay routes.
pub const OVERLAY_NEXT_HOP6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x72, 1);

/// Where the DaemonSet mounts the node's /proc/sys/net: a container's own is read-only.
pub const WRITABLE_SYSCTLS: &str = "/run/raven/sysctl-net";

/// Mount point of the BPF file system.
pub const BPFFS: &str = "/sys/fs/bpf";
/// Folder of Raven's pins. The number is the layout version: a new layout does not touch the maps of an old one.
pub const PINS: &str = "/sys/fs/bpf/raven/v1";
/// TC priorities of Raven's filters on kernels without TCX (before 6.6). The first is preferred, because a filter that
/// runs earlier may return a final verdict; the second is used where a filter of another kind has the first. Filters
/// with the same priority (Cilium also uses 1) are distinguished by handle, and the newest runs first.
pub const TC_PRIORITIES: [u16; 2] = [1, 4472];
/// Handle of Raven's TC filters.
pub const TC_HANDLE: u16 = 4472;

/// The nftables table (family inet) that determines the sources of packets that leave by Raven's devices.
pub const NFT_TABLE: &str = "raven";

/// Folder of the files that outlive the agent.
pub const STATE_DIR: &str = "/var/lib/raven";
/// File of the WireGuard private key, in [`STATE_DIR`].
pub const KEY_FILE: &str = "wireguard.key";
/// File of the last topology, in [`STATE_DIR`].
pub const SNAPSHOT_FILE: &str = "topology.json";
/// Folder of the proxy's key and certificate on a node that dials, in [`STATE_DIR`].
pub const PROXY_CLIENT_DIR: &str = "proxy.client";
/// Folder of the proxy's key and certificate on a node that is dialled, in [`STATE_DIR`].
pub const PROXY_SERVER_DIR: &str = "proxy.server";
