#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

// Network namespaces for a bench. They live as long as the processes in them: nothing is left
// behind, and nothing outside is touched.

// Puts the calling process into a fresh network namespace where it may make more of them and
// configure them; without root also into a user namespace. Throws phalanx::Error with the cause.
void enter_network_sandbox();
// A fresh network namespace for the calling process, which must be in a sandbox.
void enter_own_network();
// From the sandbox: joins the namespaces of these processes, two by a veth pair, more by a bridge.
// Device "bench" in each, not configured yet.
void join_networks(const std::vector<pid_t>& processes);
// In a joined namespace: brings device and loopback up. Returns the address.
std::string configure_network(int rank);
[[nodiscard]] std::string network_address(int rank);
