//! Creates the namespaces of a [`Site`], their devices, addresses, routes and NAT.
//!
//! Built from pods outwards: a pod creates the veth to its node, a node the one to its router, a router the one to the
//! internet. When a namespace is configured, by one `ip -batch`, all devices that others create in it already exist.

use std::fmt::Write;
use std::fs;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::eventually;
use crate::namespace::{Namespace, feed, output};
use crate::site::{
    CLUSTER_V4, CLUSTER_V6, CONTROL_PLANE, CONTROL_PLANE_V6, Masquerade, MasqueradeBy, Nat, Node, Pod, Pool, Site,
};

/// Settings that devices inherit at their creation. Without duplicate address detection, an
/// IPv6 address works immediately.
const BEFORE: [(&str, &str); 4] = [
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/all/accept_ra", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
];
const FORWARDING: [(&str, &str); 3] =
    [("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1"), ("net/ipv6/conf/default/forwarding", "1")];
/// Bridge settings of nodes, where kube-proxy must see packets between pods of one bridge. LAN
/// bridges are plain switches.
const BRIDGE_CALLS: [&str; 2] = ["?net/bridge/bridge-nf-call-iptables", "?net/bridge/bridge-nf-call-ip6tables"];

/// Builds the network of a lab.
pub(crate) fn build(site: &Site) -> Result<()> {
    create_namespaces(site)?;
    for node in &site.nodes {
        node.pods.iter().try_for_each(|pod| build_pod(node, pod))?;
    }
    for node in &site.nodes {
        build_node(site, node).with_context(|| format!("build node {}", node.name))?;
    }
    build_control_plane(site).context("build the control plane's namespace")?;
    for pool in &site.pools {
        build_router(site, pool).with_context(|| format!("build the router of {}", pool.spec.name))?;
    }
    build_internet(site)
}

fn create_namespaces(site: &Site) -> Result<()> {
    let mut batch = String::new();
    for ns in site.namespaces() {
        writeln!(batch, "netns add {}", ns.name)?;
    }
    feed(Command::new("ip").args(["-batch", "-"]), &batch).context("create the network namespaces")?;
    site.namespaces().into_iter().try_for_each(|ns| ns.sysctls(&BEFORE))
}

fn build_pod(node: &Node, pod: &Pod) -> Result<()> {
    let device = pod_device(node, pod);
    pod.ns.ip(&format!(
        "link set lo up
link add eth0 type veth peer name {device} netns {ns}
link set eth0 up
addr add {v4}/24 dev eth0
addr add {v6}/64 dev eth0 nodad
route add default via {gw4} dev eth0
route add default via {gw6} dev eth0
",
        ns = node.ns.name,
        v4 = pod.v4,
        v6 = pod.v6,
        gw4 = node.pod_v4(1),
        gw6 = node.pod_v6(1),
    ))
}

/// Returns the name of a pod's device on its node.
fn pod_device(node: &Node, pod: &Pod) -> String {
    let index = node.pods.iter().position(|p| p.name == pod.name).unwrap_or_default();
    format!("pod{index}")
}

fn build_node(site: &Site, node: &Node) -> Result<()> {
    build_mounts(node)?;
    node.ns.sysctls(&FORWARDING)?;
    node.ns.sysctls(&BRIDGE_CALLS.map(|name| (name, "1")))?;
    let pool = &site.pool(&node.pool).spec;
    let mut batch = format!(
        "link set lo up
link add eth0 type veth peer name {name} netns {router}
link set eth0 up
addr add {lan6}/64 dev eth0 nodad
route add default via {gw6} dev eth0
link add cni0 type bridge
link set cni0 up
addr add {pod4}/24 dev cni0
addr add {pod6}/64 dev cni0 nodad
",
        name = node.name,
        router = site.pool(&node.pool).router.name,
        lan6 = node.lan_v6,
        gw6 = pool.lan_v6(1),
        pod4 = node.pod_v4(1),
        pod6 = node.pod_v6(1),
    );
    if !node.ipv6_only {
        let (lan, gateway) = (node.lan_v4, pool.lan_v4(1));
        writeln!(batch, "addr add {lan}/24 dev eth0\nroute add default via {gateway} dev eth0")?;
    }
    for pod in &node.pods {
        let device = pod_device(node, pod);
        writeln!(batch, "link set {device} master cni0\nlink set {device} up")?;
    }
    for other in site.nodes_of(&node.pool).filter(|n| n.name != node.name) {
        let hop = if other.ipv6_only { format!("inet6 {}", other.lan_v6) } else { other.lan_v4.to_string() };
        writeln!(batch, "route add {} via {hop} dev eth0", other.pod_cidr_v4())?;
        writeln!(batch, "route add {} via {} dev eth0", other.pod_cidr_v6(), other.lan_v6)?;
    }
    node.ns.ip(&batch)?;
    // Required for native XDP_REDIRECT and aggregation on a veth; real network cards have it enabled.
    node.ns.run("ethtool", &["-K", "eth0", "gro", "on"])?;
    masquerade(site, node)
}

impl MasqueradeBy {
    /// Returns all tools that work on this machine. Prints the others as skipped, with the reason.
    pub fn all() -> Vec<Self> {
        let mut all = vec![Self::Nftables, Self::Iptables];
        match output(Command::new("unshare").args([
            "-n",
            "sh",
            "-ec",
            "iptables-legacy -t nat -L -n; ip6tables-legacy -t nat -L -n",
        ])) {
            Ok(_) => all.push(Self::IptablesLegacy),
            // Written directly, because the test harness hides the output of eprintln! in a passing test.
            Err(why) => drop(writeln!(std::io::stderr(), "SKIPPED: legacy iptables: {why:#}")),
        }
        all
    }
}

/// Writes the CNI's masquerade rules. Multicast is excluded, as in the bridge plugin.
fn masquerade(site: &Site, node: &Node) -> Result<()> {
    let (own_v4, own_v6) = match site.masquerade {
        Masquerade::Never => return Ok(()),
        Masquerade::BeyondCluster => (vec![CLUSTER_V4.to_owned()], vec![CLUSTER_V6.to_owned()]),
        Masquerade::BeyondPool => (
            site.nodes_of(&node.pool).map(Node::pod_cidr_v4).collect(),
            site.nodes_of(&node.pool).map(Node::pod_cidr_v6).collect(),
        ),
    };
    match site.masquerade_by {
        MasqueradeBy::Nftables => node.ns.nft(&format!(
            "table inet cni {{
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {} ip daddr != {{ {}, 224.0.0.0/4 }} counter masquerade
    ip6 saddr {} ip6 daddr != {{ {}, ff00::/8 }} counter masquerade
  }}
}}
",
            node.pod_cidr_v4(),
            own_v4.join(", "),
            node.pod_cidr_v6(),
            own_v6.join(", "),
        )),
        by => {
            let legacy = if by == MasqueradeBy::IptablesLegacy { "-legacy" } else { "" };
            let rules = |from: &str, own: &[String], multicast: &str| {
                let mut rules = String::from("*nat\n:CNI-MASQ - [0:0]\n");
                let _ = writeln!(rules, "-A POSTROUTING -s {from} -j CNI-MASQ");
                for prefix in own {
                    let _ = writeln!(rules, "-A CNI-MASQ -d {prefix} -j RETURN");
                }
                let _ = writeln!(rules, "-A CNI-MASQ ! -d {multicast} -j MASQUERADE\nCOMMIT");
                rules
            };
            let v4 = rules(&node.pod_cidr_v4(), &own_v4, "224.0.0.0/4");
            let v6 = rules(&node.pod_cidr_v6(), &own_v6, "ff00::/8");
            feed(node.ns.command(format!("iptables{legacy}-restore")).args(["-w", "--noflush"]), &v4)?;
            feed(node.ns.command(format!("ip6tables{legacy}-restore")).args(["-w", "--noflush"]), &v6)
        }
    }
}

/// Creates the node's own view of the file system, so that an agent uses the same paths as on a separate machine.
fn build_mounts(node: &Node) -> Result<()> {
    for sub in ["lib", "run", "wireguard", "sys"] {
        fs::create_dir_all(node.dir.join(sub))?;
    }
    // Mount points must exist on the host.
    for place in ["/var/lib/raven", "/run/raven", "/run/wireguard"] {
        fs::create_dir_all(place).with_context(|| format!("create the mount point {place}"))?;
    }
    let file = node.ns.mount.as_deref().context("the node has no mount namespace")?;
    fs::write(file, "")?;
    // sysfs shows the devices of the network namespace that mounted it. Only its `net` parts are mounted over the
    // host's, so that cgroups stay visible.
    let script = format!(
        "cd {dir}
mount -t bpf bpf /sys/fs/bpf
mount -t sysfs sysfs sys
mount --bind sys/class/net /sys/class/net
mount --bind sys/devices/virtual/net /sys/devices/virtual/net
umount -l sys
mount --bind lib /var/lib/raven
mount --bind run /run/raven
mount --bind wireguard /run/wireguard
",
        dir = node.dir.display(),
    );
    let mount = format!("--mount={}", file.display());
    let network_only = Namespace { mount: None, ..node.ns.clone() };
    output(network_only.command("unshare").args([&mount, "--propagation", "private", "sh", "-ec", &script]))
        .context("create the mount namespace")?;
    Ok(())
}

fn build_control_plane(site: &Site) -> Result<()> {
    let cloud = &site.cloud().spec;
    let link = &site.host_link;
    site.control_plane.ip(&format!(
        "link set lo up
link add eth0 type veth peer name cp netns {router}
link set eth0 up
addr add {CONTROL_PLANE}/24 dev eth0
addr add {CONTROL_PLANE_V6}/64 dev eth0 nodad
route add default via {gw} dev eth0
route add default via {gw6} dev eth0
link add host type veth peer name {device} netns {pid}
link set host up
addr add {here}/30 dev host
",
        router = site.cloud().router.name,
        gw = cloud.lan_v4(1),
        gw6 = cloud.lan_v6(1),
        device = link.device,
        // The namespace of this process, which may differ from that of process 1.
        pid = std::process::id(),
        here = link.control_plane,
    ))?;
    let batch = format!("addr add {}/30 dev {dev}\nlink set {dev} up\n", link.host, dev = link.device);
    feed(Command::new("ip").args(["-batch", "-"]), &batch)
}

fn build_router(site: &Site, pool: &Pool) -> Result<()> {
    pool.router.sysctls(&FORWARDING)?;
    pool.router.sysctls(&BRIDGE_CALLS.map(|name| (name, "0")))?;
    let spec = &pool.spec;
    let mut batch = format!(
        "link set lo up
link add wan type veth peer name {name} netns {inet}
link set wan up
addr add {wan4}/24 dev wan
addr add {wan6}/64 dev wan nodad
route add default via 198.51.100.1 dev wan
route add default via 2001:db8:ffff::1 dev wan
link add lan type bridge
link set lan up
addr add {lan4}/24 dev lan
addr add {lan6}/64 dev lan nodad
",
        name = spec.name,
        inet = site.inet.name,
        wan4 = pool.public_v4,
        wan6 = pool.public_v6,
        lan4 = spec.lan_v4(1),
        lan6 = spec.lan_v6(1),
    );
    let mut ports: Vec<&str> = site.nodes_of(&spec.name).map(|n| n.name.as_str()).collect();
    if spec.name == site.cloud().spec.name {
        ports.push("cp");
    }
    for port in ports {
        writeln!(batch, "link set {port} master lan\nlink set {port} up")?;
    }
    pool.router.ip(&batch)?;
    pool.router.nft(&router_rules(pool)?)
}

fn router_rules(pool: &Pool) -> Result<String> {
    let mut mapped = String::new();
    for forward in &pool.spec.forwards {
        let (protocol, from, to) = (forward.protocol.word(), forward.public_port, forward.port);
        writeln!(
            mapped,
            "    iifname wan ip daddr {} {protocol} dport {from} dnat ip to {}:{to}",
            pool.public_v4, forward.to
        )?;
        if let Some(v6) = forward.to_v6 {
            writeln!(
                mapped,
                "    iifname wan ip6 daddr {} {protocol} dport {from} dnat ip6 to [{v6}]:{to}",
                pool.public_v6
            )?;
        }
    }
    let how = match pool.spec.nat {
        Nat::PortPreserving => "",
        Nat::RandomPorts => " fully-random",
    };
    Ok(format!(
        "table inet router {{
  chain prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
{mapped}  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname wan masquerade{how}
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    ct state established,related accept
    iifname wan ct status dnat accept
    iifname wan counter drop
  }}
  chain input {{
    type filter hook input priority filter; policy accept;
    ct state established,related accept
    iifname wan meta l4proto {{ icmp, icmpv6 }} accept
    iifname wan counter drop
  }}
}}
"
    ))
}

fn build_internet(site: &Site) -> Result<()> {
    // The internet has no route to private addresses: a leaked packet appears on the wire and is then dropped.
    site.inet.sysctls(&FORWARDING)?;
    site.inet.sysctls(&BRIDGE_CALLS.map(|name| (name, "0")))?;
    let mut batch = String::from(
        "link set lo up
link add wire type bridge
link set wire up
addr add 198.51.100.1/24 dev wire
addr add 2001:db8:ffff::1/64 dev wire nodad
",
    );
    for pool in &site.pools {
        writeln!(batch, "link set {port} master wire\nlink set {port} up", port = pool.spec.name)?;
    }
    site.inet.ip(&batch).context("build the internet")
}

/// Waits until every device has a carrier. The kernel reports a new link to bridges up to a second late (linkwatch),
/// and until then they drop packets.
pub(crate) async fn carrying(site: &Site) -> Result<()> {
    for ns in site.namespaces() {
        eventually(Duration::from_secs(20), &format!("all devices of {} have a carrier", ns.name), async || {
            let links = output(Command::new("ip").args(["-n", &ns.name, "-br", "link"]))?;
            let waiting = links.lines().find(|line| !line.starts_with("lo ") && !line.contains(" UP "));
            waiting.map_or(Ok(()), |line| Err(anyhow!("{line}")))
        })
        .await?;
    }
    Ok(())
}

/// Reports whether this machine already has an address in the /30 network.
pub(crate) fn is_taken(network: Ipv4Addr) -> Result<bool> {
    let addresses = output(Command::new("ip").args(["-4", "-o", "addr"]))?;
    let wanted = u32::from(network) & !3;
    Ok(addresses
        .split_whitespace()
        .filter_map(|word| word.split('/').next()?.parse::<Ipv4Addr>().ok())
        .any(|address| u32::from(address) & !3 == wanted))
}

/// Bind-mounts the lab's folder on itself and makes it private, which persisted mount namespaces require.
pub(crate) fn make_private(dir: &Path) -> Result<()> {
    output(Command::new("mount").arg("--bind").arg(dir).arg(dir))?;
    output(Command::new("mount").arg("--make-private").arg(dir))?;
    Ok(())
}
