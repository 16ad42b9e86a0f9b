//! Tests of the agent's environment: each obstacle is reported once, with its remedy, in the GatewayNode.

use std::time::Duration;

use anyhow::{Context, ensure};
use kube::Api;
use raven_api::GatewayNode;
use raven_tests::{Lab, agent::binary, eventually, memory_limit::MemoryLimit, probe::Echo, proof, require_root};

use crate::Running;

/// What the agent needs at most in bytes, on a node with few processors.
const MEMORY: u64 = 64 << 20;
/// Time limit for a report. Without events, the agent checks its environment every 25 s and then writes its status.
const SOON: Duration = Duration::from_secs(90);

impl Running {
    /// Waits until `wanted` accepts status and message of the Ready condition of GatewayNode x-a.
    pub(crate) async fn until_ready(&self, what: &str, wanted: impl Fn(&str, &str) -> bool) {
        let api: Api<GatewayNode> = Api::all(self.lab.cluster().client());
        let seen = eventually(SOON, what, || async {
            let status = api.get("x-a").await?.status.context("the GatewayNode has no status")?;
            let ready = status.conditions.iter().find(|c| c.type_ == "Ready").context("there is no Ready condition")?;
            ensure!(
                wanted(&ready.status, &ready.message),
                "Ready is {} {}: {}",
                ready.status,
                ready.reason,
                ready.message
            );
            Ok(())
        });
        self.check(seen.await);
    }

    fn run_on(&self, node: &str, script: &str) -> String {
        self.check(self.lab.node(node).ns.sh(script))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn obstacles_are_reported_with_remedy_until_removed() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    running.until_ready("no obstacle", |status, _| status == "True").await;
    // A member node has no GatewayNode.
    running.run_on("x-b", "sysctl -qw net.ipv4.ip_forward=0");

    running.run_on("x-a", "iptables -P FORWARD DROP");
    running
        .until_ready("the FORWARD policy", |s, m| {
            s == "False" && m.contains("FORWARD") && m.contains("iptables -I FORWARD -i raven-wg0")
        })
        .await;
    // On a gateway node, packets from other pools arrive by the tunnel.
    let rules = |change| {
        format!("iptables {change} FORWARD -i raven-wg0 -j ACCEPT; iptables {change} FORWARD -o raven-wg0 -j ACCEPT")
    };
    running.run_on("x-a", &rules("-I"));
    running.until_ready("the advice helps", |status, _| status == "True").await;
    running.run_on("x-a", &format!("{}; iptables -P FORWARD ACCEPT", rules("-D")));
    running.until_ready("no obstacle", |status, _| status == "True").await;

    running.run_on("x-a", "ip route add 10.244.1.0/24 dev cni0 table 77; ip rule add pref 50 lookup 77");
    running
        .until_ready("the conflicting route", |s, m| s == "False" && m.contains("cni0") && m.contains("10.244.1.0/24"))
        .await;
    running.run_on("x-a", "ip rule del pref 50");
    running.until_ready("no obstacle", |status, _| status == "True").await;

    // A CNI that does not ask the host's rules. Its route shows it, although Raven's rule precedes it.
    running.run_on("x-a", "ip link add cilium_host type veth peer cilium_net; ip link set cilium_host up");
    running.run_on("x-a", "ip route add 10.244.77.0/24 dev cilium_host");
    running.run_on("x-a", "sysctl -qw net.ipv4.ip_forward=0");
    let not_named = |s: &str, m: &str| s == "False" && m.contains("ip_forward") && !m.contains("Cilium");
    running.until_ready("its device and a route to other addresses are no problem", not_named).await;
    running.run_on("x-a", "sysctl -qw net.ipv4.ip_forward=1; ip route add 10.244.1.0/24 dev cilium_host");
    running
        .until_ready("the tunnel mode", |s, m| {
            s == "False" && m.contains("Cilium in tunnel mode") && m.contains("routingMode to native")
        })
        .await;
    running.run_on("x-a", "ip link del cilium_host");
    running.until_ready("no obstacle", |status, _| status == "True").await;

    running.run_on("x-a", "sysctl -qw net.ipv4.ip_forward=0");
    running.until_ready("disabled forwarding", |s, m| s == "False" && m.contains("net.ipv4.ip_forward=1")).await;

    let published =
        eventually(Duration::from_secs(60), "the member's problem is an Event about its Gateway", || async {
            let described = running.lab.cluster().kubectl(&["describe", "gateway", "edge-x"])?;
            let event = described.lines().find(|line| line.contains("NodeProblem") && line.contains("node x-b: "));
            ensure!(event.is_some_and(|line| line.contains("sysctl -w net.ipv4.ip_forward=1")), "{described}");
            Ok(())
        });
    running.check(published.await);
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_rp_filter_does_not_drop_packets() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    for node in ["x-a", "x-b", "cloud-a", "cloud-b"] {
        // As on hardened systems: `all`, and `default`, which new devices inherit.
        running.run_on(node, "for name in all default eth0 cni0; do sysctl -qw net.ipv4.conf.$name.rp_filter=1; done");
    }
    let (cloud, edge) = (running.lab.pool("cloud").clone(), running.lab.pool("edge-x").clone());
    running.check(proof::reach(&running.lab, &cloud, &edge, 0).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn lan_whose_mask_contains_the_pods_keeps_the_routes() {
    require_root!();
    let mut running = Running::start().await.expect("start the lab");
    for name in ["x-a", "x-b"] {
        let node = running.lab.node(name).clone();
        let lan = node.lan_v4;
        running.run_on(
            name,
            &format!(
                "ip addr add {lan}/8 dev eth0; ip addr del {lan}/24 dev eth0; ip route replace default via 10.1.0.1"
            ),
        );
        running.agent(name).restart().expect("restart the agent");
        let ready = proof::ready(running.agent(name)).await;
        running.check(ready);
    }
    let (cloud, edge) = (running.lab.pool("cloud").clone(), running.lab.pool("edge-x").clone());
    running.check(proof::reach(&running.lab, &cloud, &edge, 0).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn port_in_use_is_reported_and_used_when_free() {
    require_root!();
    let mut running = Running::start().await.expect("start the lab");
    let node = running.lab.node("x-a").clone();
    for (port, word) in [(4472, "raven0"), (4500, "raven-wg0")] {
        running.agent("x-a").kill().expect("kill the agent");
        running.check(running.lab.agent_command("x-a", &["cleanup", "--keep-state"]));
        // A process that cleanup ended may hold the port for another moment.
        let free = async || Echo::on(&node.ns, ([0, 0, 0, 0], port).into());
        let taken = running.check(eventually(Duration::from_secs(10), "the test can occupy the port", free).await);
        running.agent("x-a").restart().expect("restart the agent");
        let what = format!("UDP port {port} is reported");
        running
            .until_ready(&what, |status, message| {
                status == "False" && message.contains(&port.to_string()) && message.contains(word)
            })
            .await;
        drop(taken);
        running.until_ready("no obstacle", |status, _| status == "True").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_exits_and_names_missing_requirement() {
    require_root!();
    let lab = Lab::builder().without_kubernetes().up().await.expect("start the lab");
    let agent = binary("raven-agent").expect("raven-agent is built");
    let agent = agent.to_string_lossy();
    let failure = |script: &str| {
        let done = lab.node("x-a").ns.command("sh").args(["-c", script]).output().expect("run sh");
        assert!(!done.status.success(), "{script} must fail");
        String::from_utf8_lossy(&done.stderr).into_owned()
    };
    // Root without all capabilities, as in a container whose manifest lacks one.
    let without = failure(&format!(
        "exec setpriv --bounding-set=-sys_admin,-bpf --inh-caps=-all {agent} --node-name x-a --offline"
    ));
    assert!(without.contains("CAP_BPF"), "{without}");
    let no_bpffs = failure(&format!("mount -t tmpfs none /sys/fs/bpf; exec {agent} --node-name x-a --offline"));
    assert!(no_bpffs.contains("is not a BPF file system") && no_bpffs.contains("mount -t bpf"), "{no_bpffs}");
    let nameless = failure(&format!("exec env -u NODE_NAME {agent} --offline"));
    assert!(nameless.contains("--node-name"), "{nameless}");
}

/// The rules of kube-proxy for 5,000 Services with two endpoints each.
fn service_rules() -> String {
    let mut rules = String::from("table ip nat {\n");
    for service in 0..5000 {
        for endpoint in 0..2 {
            let address = format!("10.{endpoint}.{}.{}", service / 250, service % 250 + 1);
            rules += &format!("chain SEP-{service}-{endpoint} {{\nmeta l4proto tcp dnat to {address}:80\n}}\n");
        }
        rules +=
            &format!("chain SVC-{service} {{\nnumgen random mod 2 0 jump SEP-{service}-0\njump SEP-{service}-1\n}}\n");
    }
    // The node may have a table of this name: added, so that it can be deleted.
    rules
        + "}\nadd table ip filter\ndelete table ip filter\ntable ip filter {\nchain FORWARD {\ntype filter hook forward priority 0; policy drop;\n}\n}\n"
}

#[tokio::test(flavor = "multi_thread")]
async fn firewall_of_five_thousand_services_is_checked_cheaply() {
    require_root!();
    let mut running = Running::start().await.expect("start the lab");
    match MemoryLimit::new("x-a", MEMORY) {
        Ok(limit) => running.agent("x-a").limit_memory(limit),
        Err(e) => println!("SKIPPED the limit of memory: {e:#}"),
    }
    running.agent("x-a").restart().expect("restart the agent");
    let ready = proof::ready(running.agent("x-a")).await;
    running.check(ready);
    let file = running.lab.logs().join("services.nft");
    std::fs::write(&file, service_rules()).expect("write the rules");
    running.run_on("x-a", &format!("nft -f {}", file.display()));
    let pid = running.agent("x-a").process.pid();
    let before = running.check(children_cpu(pid));
    running
        .until_ready("the FORWARD policy", |s, m| s == "False" && m.contains("FORWARD") && m.contains("10.244."))
        .await;
    let checks = running.check(children_cpu(pid)) - before;
    let all = running.run_on("x-a", "nft -j list ruleset >/dev/null; times");
    let all = running.check(cpu_of_times(&all));
    if let Some(limit) = running.agent("x-a").memory_limit() {
        println!("the agent with 5,000 Services: {:.1} MB", limit.used_mb().expect("read the memory"));
        assert_eq!(limit.killed().expect("read the events"), 0, "processes killed by the limit of memory");
    }
    running.agent("x-a").process.ensure_running().expect("the agent runs");
    assert!(checks < all, "the agent's nft used {checks:.2} s, one listing of everything uses {all:.2} s");
}

/// CPU time in seconds of the ended children of a process, by proc_pid_stat(5).
fn children_cpu(pid: u32) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("no name")?.1.split_whitespace().collect();
    // Fields 16 and 17 of the manual page, in ticks of 10 ms; the first one here is its third.
    let ticks = fields[13].parse::<f64>()? + fields[14].parse::<f64>()?;
    Ok(ticks / 100.0)
}

/// CPU time in seconds of a shell's children, from the second line of its command `times`: `0m1.5s 0m0.25s`.
fn cpu_of_times(output: &str) -> anyhow::Result<f64> {
    let line = output.lines().nth(1).context("two lines")?;
    line.split_whitespace().try_fold(0.0, |sum, part| {
        let (minutes, seconds) = part.trim_end_matches('s').split_once('m').context("minutes")?;
        Ok(sum + minutes.parse::<f64>()? * 60.0 + seconds.parse::<f64>()?)
    })
}

/// An administrator has disabled IPv6 on all devices but one, so the kernel refuses the IPv6 routes of the interception.
#[tokio::test(flavor = "multi_thread")]
async fn refused_ipv6_does_not_stop_the_interception_of_ipv4() {
    require_root!();
    let mut running = Running::start().await.expect("start the lab");
    running.agent("cloud-a").kill().expect("kill the agent");
    running.run_on(
        "cloud-a",
        "ip route flush table 9029; while ip rule del lookup 9029 2>/dev/null; do :; done
         ip -6 route flush table 9029; while ip -6 rule del lookup 9029 2>/dev/null; do :; done
         sysctl -qw net.ipv6.conf.lo.disable_ipv6=1",
    );
    running.agent("cloud-a").restart().expect("restart the agent");
    let intercepted = || async {
        let route = running.lab.node("cloud-a").ns.sh("ip route get 10.1.0.12 ipproto tcp dport 10250")?;
        ensure!(route.contains("dev lo"), "{route}");
        Ok(())
    };
    running.check(eventually(SOON, "kubelets are intercepted by IPv4", intercepted).await);
    let rules = running.run_on("cloud-a", "ip -6 rule show");
    assert!(!rules.contains("lookup 9029"), "the kernel has not refused IPv6: {rules}");
}
