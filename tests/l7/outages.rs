//! Links that break and agents that die: new requests work again at once. The kubelet is an HTTP server on its read-only port.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::{discovery::v1::EndpointSlice, events::v1::Event};
use kube::{Api, api::ListParams};
use raven_api::{
    gateway::{Endpoint, EndpointType, Gateway, ProxyConfig},
    proxy::INTERNAL_SERVICE,
};
use raven_tests::{
    Lab, Namespace, Nat, PoolSpec, Protocol, eventually, kubernetes::objects::default_gateway, patience, privileged, process::Process,
    proof,
};

use crate::{Running, SOON};

/// A request by short attempts may take so long each: one that began a moment too early is given up, and the next one is answered.
const ATTEMPT: Duration = Duration::from_secs(1);
/// How soon new requests work again: within 2 s of the link's return, as the issue has it. The rest is the looking: a pause of 100 ms
/// between two attempts, and a thread, a connection and an answer on a busy machine.
const LINK_BACK: Duration = Duration::from_millis(2_000 + 300);
/// The same for what is not told by the link: the edge's next ping (2 s) is answered by a reset, it dials anew (within 1 s), and a request
/// that waits at the old tunnel goes over to the new one (0.5 s). A killed agent needs as long for its start.
const TUNNEL_BACK: Duration = Duration::from_secs(4);
/// How soon a gateway node that died is out of the Service: nothing that an edge sends is acknowledged for 3 s, and it pings every 2 s; two
/// edges write that down, one after the other, and the controller what follows from it, after up to 1 s in which more might follow.
const OUT_OF_SERVICE: Duration = Duration::from_secs(10);

/// What was measured may not be longer than its limit, which has the patience that all deadlines have.
fn within(limit: Duration, took: Duration) {
    assert!(took < limit.mul_f64(patience()), "it took {took:?}");
}

impl Running {
    /// An HTTP server on a node's port 10255; gives back when it listens.
    pub(crate) async fn serve(&self, node: &str) -> Result<Process> {
        let node = self.lab.node(node);
        std::fs::create_dir_all(node.dir.join("www"))?;
        std::fs::write(node.dir.join("www/metrics"), format!("of {}\n", node.name))?;
        let mut command = node.ns.command("busybox");
        command.args(["httpd", "-f", "-p", "10255", "-h"]).arg(node.dir.join("www"));
        let mut process = Process::start(format!("httpd-{}", node.name), &self.lab.logs(), command)?;
        eventually(SOON, &format!("the server of {} listens", node.name), || {
            let listens = process.ensure_running().and_then(|()| {
                ensure!(!node.ns.sh("ss -Hltn 'sport = :10255'")?.is_empty(), "not yet");
                Ok(())
            });
            async { listens }
        })
        .await?;
        Ok(process)
    }

    /// One request by name, to the gateway node itself.
    pub(crate) fn ask(&self, from: &str, node: &str, seconds: u32) -> Result<String> {
        self.ask_at("10.0.0.11", from, node, seconds)
    }

    /// The same to another gateway node.
    fn ask_at(&self, gateway: &str, from: &str, node: &str, seconds: u32) -> Result<String> {
        self.lab.node(from).ns.sh(&format!("curl -sS -m {seconds} -H 'Host: {node}:10255' http://{gateway}:10264/metrics"))
    }

    /// Waits until a request by address is answered by a node: the rules that lead there are not those of names.
    async fn answered_by_address(&self, from: &Namespace, address: &str, node: &str) -> Result<()> {
        eventually(SOON, &format!("a request of {} to {address} is answered by {node}", from.name), || async {
            let text = from.sh(&format!("curl -sS -m 10 http://{address}:10255/metrics"))?;
            ensure!(text == format!("of {node}\n"), "it says {text:?}");
            Ok(())
        })
        .await
    }

    pub(crate) async fn answered(&self, node: &str) -> Result<Duration> {
        let begin = Instant::now();
        let what = format!("a request for {node} is answered");
        eventually(SOON, &what, || async {
            let text = self.ask("cloud-b", node, 5)?;
            ensure!(text == format!("of {node}\n"), "it says {text:?}");
            Ok(())
        })
        .await?;
        Ok(begin.elapsed())
    }

    /// The same by attempts that are short, without a program's start in each: from when on requests are answered, and not how long one
    /// of them hung.
    async fn answered_soonest(&self, node: &str) -> Result<()> {
        let host = format!("{node}:10255");
        eventually(SOON, &format!("a new request for {node} is answered"), || async {
            let answer = proof::http_of(&self.lab.node("cloud-b").ns, "10.0.0.11:10264", &host, "/metrics", ATTEMPT.mul_f64(patience()));
            let answer = answer.await?;
            ensure!(answer.starts_with("HTTP/1.1 200 ") && answer.contains(&format!("of {node}\n")), "it says {answer:?}");
            Ok(())
        })
        .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_work_again_when_the_link_and_the_agents_are_back() {
    if !privileged("requests_work_again_when_the_link_and_the_agents_are_back") {
        return;
    }
    let mut pools = PoolSpec::three();
    pools[1].nat = Nat::RandomPorts;
    let mut running = Running::of(Lab::builder().pools(pools)).await.expect("the lab starts");
    for node in ["x-b", "y-b"] {
        running.check(running.serve(node).await);
        running.check(running.answered(node).await);
    }
    // Its own pool's nodes are reached directly, and both ways by address, from both kinds of cloud nodes.
    running.check(running.serve("cloud-b").await);
    assert_eq!(running.check(running.ask("cloud-a", "cloud-b", 5)), "of cloud-b\n");
    for from in ["cloud-a", "cloud-b"] {
        running.check(running.answered_by_address(&running.lab.node(from).ns, "10.1.0.12", "x-b").await);
    }
    // From a pod of the gateway node.
    running.check(running.answered_by_address(&running.lab.pod("cloud-a").ns, "10.2.0.12", "y-b").await);

    // The link is cut for 30 s; the other site is not touched by it.
    let router = running.lab.pool("edge-x").router.clone();
    running.check(router.sh("ip link set wan down"));
    let end = tokio::time::Instant::now() + Duration::from_secs(30);
    running.check(running.answered("y-b").await);
    let refused = running.ask("cloud-b", "x-b", 20).expect("an answer, no hang");
    assert!(refused.contains("no tunnel to Gateway edge-x"), "{refused}");
    tokio::time::sleep_until(end).await;
    let back = Instant::now();
    running.check(router.sh("ip link set wan up; ip route replace default via 198.51.100.1 dev wan"));
    running.check(running.answered_soonest("x-b").await);
    let after = back.elapsed();
    println!("new requests work {} ms after the link is back", after.as_millis());
    within(LINK_BACK, after);

    // The site's NAT forgets everything and gives out other ports: the edge is told so by the answer to its next ping.
    running.check(router.sh("conntrack -F 2>/dev/null"));
    let rebound = running.check(running.answered("x-b").await);
    println!("new requests work {} ms after the NAT has forgotten", rebound.as_millis());
    within(TUNNEL_BACK, rebound);

    // Agents die, on both sides, without a word.
    for node in ["x-a", "cloud-a"] {
        running.agent(node).kill().expect("the agent dies");
        if node == "cloud-a" {
            // Never by whatever the gateway node itself has on that port.
            running.check(running.serve("cloud-a").await);
            let unanswered = running.lab.node("cloud-a").ns.sh("curl -sS -m 3 http://10.1.0.12:10255/metrics");
            assert!(unanswered.is_err(), "{unanswered:?}");
        }
        running.agent(node).restart().expect("the agent starts again");
        let again = running.check(running.answered("x-b").await);
        println!("new requests work {} ms after the agent of {node} was started again", again.as_millis());
        within(TUNNEL_BACK, again);
    }
    running.check(running.answered_by_address(&running.lab.node("cloud-b").ns, "10.1.0.12", "x-b").await);

    // Each stream has one id, in the logs of both gateway nodes.
    let ids = |node: &str| -> BTreeSet<String> {
        let log = std::fs::read_to_string(running.lab.logs().join(format!("agent-{node}.log"))).unwrap_or_default();
        let plain = log.replace("\u{1b}[3m", "").replace("\u{1b}[0m", "").replace("\u{1b}[2m", "");
        plain.split("stream=").skip(1).filter_map(|rest| rest.split_whitespace().next()).map(str::to_owned).collect()
    };
    let (cloud, edge) = (ids("cloud-a"), ids("x-a"));
    // Without those that were open when an agent was killed.
    assert!(edge.intersection(&cloud).count() > 3, "at the edge {edge:?}, in the cloud {cloud:?}");

    // L7 switched off: nothing of it listens, leads anywhere or goes on.
    let client = &mut running.lab.node("cloud-b").ns.command("busybox");
    let mut open = Killed(client.args(["nc", "10.1.0.12", "10255"]).stdin(std::process::Stdio::piped()).spawn().expect("nc starts"));
    // Who says nothing at all has no stream.
    std::io::Write::write_all(open.0.stdin.as_mut().expect("piped"), b"GET /").expect("said");
    let streams = async || proof::metric(&running.lab.node("x-a").ns, "raven_proxy_open_streams").await?.context("it is told");
    let opened = || async {
        ensure!(streams().await? != 0);
        Ok(())
    };
    running.check(eventually(SOON, "a stream is open", opened).await);
    running.check(running.lab.cluster().put_setting("raven-cfg", "enable-l7-proxy", "false").await);
    let gone = || async {
        let left = running.lab.node("cloud-a").ns.sh("ss -Hltn | grep -E ':(1026[234]|20000) ' || true; ip rule | grep 9029 || true")?;
        ensure!(left.is_empty(), "{left}");
        let left = running.lab.node("cloud-b").ns.sh("ip rule | grep 9029 || true")?;
        ensure!(left.is_empty(), "{left}");
        let open = streams().await?;
        ensure!(open == 0, "{open} streams are open");
        Ok(())
    };
    running.check(eventually(SOON, "L7 is off", gone).await);
}

/// Ends with the value.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_two_sites_have_is_refused_and_the_names_work() {
    if !privileged("an_address_that_two_sites_have_is_refused_and_the_names_work") {
        return;
    }
    // Both sites are clones of one image: the same LAN, the same addresses.
    let mut pools = PoolSpec::three();
    pools[2].lan = Some(1);
    let running = Running::of(Lab::builder().pools(pools)).await.expect("the lab starts");
    for node in ["x-b", "y-b"] {
        running.check(running.serve(node).await);
        running.check(running.answered(node).await);
    }
    let ns = &running.lab.node("cloud-a").ns;
    let refused = || async {
        let said = ns.sh("curl -sS -m 10 http://10.1.0.12:10255/metrics")?;
        assert!(!said.starts_with("of "), "it is guessed: {said}");
        ensure!(said == "raven: the address 10.1.0.12 belongs to several nodes (x-b, y-b): reach them by name\n", "it says {said:?}");
        Ok(())
    };
    running.check(eventually(SOON, "the address is refused", refused).await);
    let counted = running.check(proof::metric(ns, "raven_proxy_refused_total{reason=\"Ambiguous\"}").await);
    assert!(counted.is_some_and(|n| n > 0), "{counted:?}");
    let events: Api<Event> = Api::all(running.lab.cluster().client());
    let told = || async {
        let events = events.list(&ListParams::default()).await?.items;
        let of = |gateway: &str| {
            events.iter().find(|e| {
                e.reason.as_deref() == Some("NodeAddressAmbiguous") && e.regarding.as_ref().and_then(|r| r.name.as_deref()) == Some(gateway)
            })
        };
        let note = of("edge-y").and_then(|e| e.note.clone()).context("no Event about edge-y")?;
        ensure!(note.contains("y-b (10.1.0.12 is also the address of node x-b of Gateway edge-x)"), "{note}");
        Ok(())
    };
    running.check(eventually(SOON, "an Event says so", told).await);
}

/// The cloud's Gateway with a proxy on each of its first two nodes, both by the router's address.
fn two_proxies(lab: &Lab) -> Gateway {
    let mut gateway = default_gateway(lab.site(), lab.cloud());
    let proxy = |node: &str, public_port: Option<i32>| Endpoint {
        node_name: node.to_owned(),
        type_: EndpointType::Proxy,
        public_ip: Some(lab.cloud().public_v4.to_string()),
        public_port,
        ..Endpoint::default()
    };
    gateway.spec.endpoints.extend([proxy("cloud-a", None), proxy("cloud-b", Some(SECOND_PORT.into()))]);
    gateway.spec.proxy_config = Some(ProxyConfig { replicas: 2, ..ProxyConfig::default() });
    gateway
}

/// Where the router maps the second proxy's port.
const SECOND_PORT: u16 = 10272;

/// A request by address.
struct Asked {
    began: Instant,
    took: Duration,
    failure: Option<String>,
}

/// Asks for x-b by its address, five times a second, until it is told to stop. Not one request after the other: one that was under way when
/// the fault came would hang, and none would be asked meanwhile.
struct Asking {
    stop: std::sync::mpsc::Sender<()>,
    thread: std::thread::JoinHandle<Vec<std::thread::JoinHandle<Asked>>>,
}

impl Asking {
    fn start(lab: &Lab, from: &str, address: &str) -> Self {
        let (stop, stopped) = std::sync::mpsc::channel();
        let ns = lab.node(from).ns.clone();
        let command = format!("curl -sS -m 30 http://{address}:10255/metrics");
        let ask = move || {
            let began = Instant::now();
            let failure = match ns.sh(&command) {
                Ok(text) if text == "of x-b\n" => None,
                Ok(text) => Some(format!("it says {text:?}")),
                Err(e) => Some(format!("{e:#}")),
            };
            Asked { began, took: began.elapsed(), failure }
        };
        let thread = std::thread::spawn(move || {
            let mut asked = Vec::new();
            while stopped.recv_timeout(Duration::from_millis(200)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                asked.push(std::thread::spawn(ask.clone()));
            }
            asked
        });
        Self { stop, thread }
    }

    /// How many were asked after the fault, and the longest of them; fails if one of these failed. Those that began before may have been
    /// under way when it came, and nobody can answer them.
    fn stop(self, fault: Instant) -> Result<(usize, Duration)> {
        let _ = self.stop.send(());
        let threads = self.thread.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?;
        let asked = threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a request's thread panicked")));
        let asked: Vec<Asked> = asked.collect::<Result<_>>()?;
        let after: Vec<&Asked> = asked.iter().filter(|a| a.began >= fault).collect();
        let failures: Vec<&str> = after.iter().filter_map(|a| a.failure.as_deref()).collect();
        ensure!(failures.is_empty(), "{} of {} requests failed: {}", failures.len(), after.len(), failures.join("; "));
        let longest = after.iter().map(|a| a.took).max().context("nothing was asked after the fault: this proves nothing")?;
        Ok((after.len(), longest))
    }
}

/// Waits until exactly these addresses are behind the Service.
async fn behind_the_service(lab: &Lab, wanted: &[&str]) -> Result<Duration> {
    let begin = Instant::now();
    let slices: Api<EndpointSlice> = Api::namespaced(lab.cluster().client(), raven_api::DEFAULT_NAMESPACE);
    let of_service = ListParams::default().labels(&format!("kubernetes.io/service-name={INTERNAL_SERVICE}"));
    eventually(SOON, &format!("{} behind the Service", wanted.join(" and ")), || async {
        let list = slices.list(&of_service).await?;
        let mut addresses: Vec<String> = list.items.into_iter().flat_map(|s| s.endpoints).flat_map(|e| e.addresses).collect();
        addresses.sort();
        ensure!(addresses == wanted, "it has {addresses:?}");
        Ok(())
    })
    .await?;
    Ok(begin.elapsed())
}

#[tokio::test(flavor = "multi_thread")]
async fn with_two_cloud_gateways_new_requests_keep_working_when_one_dies() {
    if !privileged("with_two_cloud_gateways_new_requests_keep_working_when_one_dies") {
        return;
    }
    let mut pools = PoolSpec::three();
    pools[0].nodes.push("cloud-c".to_owned());
    let mut second = pools[0].forward(Protocol::Tcp, 10262, 1);
    second.public_port = SECOND_PORT;
    pools[0].forwards.push(second);
    let mut running = Running::of(Lab::builder().pools(pools)).await.expect("the lab starts");
    running.check(running.lab.cluster().apply_gateway(&two_proxies(&running.lab)).await);
    running.check(running.serve("x-b").await);
    let both = ["10.0.0.11", "10.0.0.12"];
    running.check(behind_the_service(&running.lab, &both).await);

    // The one with its whole node, the other's agent alone: whichever of the two the client's requests went to, it is met once.
    for (victim, left) in [("cloud-a", both[1]), ("cloud-b", both[0])] {
        // That a gateway node is ready does not say that this site has a tunnel to it already.
        for gateway in both {
            let answers = || async {
                let text = running.ask_at(gateway, "cloud-c", "x-b", 5)?;
                ensure!(text == "of x-b\n", "it says {text:?}");
                Ok(())
            };
            running.check(eventually(SOON, &format!("x-b is reached by {gateway}"), answers).await);
        }
        running.check(running.answered_by_address(&running.lab.node("cloud-c").ns, "10.1.0.12", "x-b").await);
        let asking = Asking::start(&running.lab, "cloud-c", "10.1.0.12");
        if victim == "cloud-a" {
            // Its cable is pulled: its own end would lose its routes.
            running.check(running.lab.cloud().router.sh("ip link set cloud-a down"));
        } else {
            running.agent(victim).kill().expect("the agent dies");
        }
        let fault = Instant::now();
        let noticed = running.check(behind_the_service(&running.lab, &[left]).await);
        // New ones go to the other by now; those from before are still waited for.
        let (asked, longest) = running.check(asking.stop(fault));
        println!(
            "{victim} dies: out of the Service after {} ms; {asked} requests by address since, none failed, the longest took {} ms",
            noticed.as_millis(),
            longest.as_millis()
        );
        within(OUT_OF_SERVICE, noticed);
        assert_eq!(running.check(running.ask_at(left, "cloud-c", "x-b", 5)), "of x-b\n");
        if victim == "cloud-a" {
            running.check(running.lab.cloud().router.sh("ip link set cloud-a up"));
        }
        running.agent(victim).restart().expect("the agent starts again");
        running.check(behind_the_service(&running.lab, &both).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thin_link_carries_more_than_fits_into_it_and_small_requests_beside_it() {
    if !privileged("a_thin_link_carries_more_than_fits_into_it_and_small_requests_beside_it") {
        return;
    }
    const BYTES: usize = 3_000_000;
    let running = Running::of(Lab::builder()).await.expect("the lab starts");
    running.check(running.serve("x-b").await);
    std::fs::write(running.lab.node("x-b").dir.join("www/large"), vec![b'x'; BYTES]).expect("a file");
    running.check(running.answered("x-b").await);
    let tunnels = || running.lab.node("cloud-a").ns.sh("curl -sS http://[::1]:10265/tunnels | grep edge-x | sed 's/,.*//' | sort");
    let both = || async {
        let shown = tunnels()?;
        ensure!(shown.lines().count() == 2, "{shown}");
        Ok(shown)
    };
    let before = running.check(eventually(SOON, "both tunnels are up", both).await);
    // 1 Mbit/s out of the site, and a router that keeps up to two seconds of it in its queue.
    let router = running.lab.pool("edge-x").router.clone();
    running.check(router.sh("tc qdisc add dev wan root tbf rate 1mbit burst 16kb latency 2s"));
    let ns = running.lab.node("cloud-b").ns.clone();
    let large = std::thread::spawn(move || ns.sh("curl -sS -m 120 -H 'Host: x-b:10255' http://10.0.0.11:10264/large | wc -c"));
    let mut slowest = Duration::ZERO;
    while !large.is_finished() {
        let begin = Instant::now();
        assert_eq!(running.check(running.ask("cloud-b", "x-b", 20)), "of x-b\n");
        slowest = slowest.max(begin.elapsed());
    }
    let arrived = running.check(large.join().expect("no panic"));
    assert_eq!(arrived.trim(), BYTES.to_string());
    println!("{BYTES} bytes by a link of 1 Mbit/s; the slowest small request beside it took {} ms", slowest.as_millis());
    assert_eq!(running.check(tunnels()), before, "the same tunnels as before");
}
