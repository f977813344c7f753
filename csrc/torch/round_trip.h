// How far apart torch's threads are.
#pragma once

namespace pyperc {

// Nanoseconds that a cache line takes from the calling thread to another of torch's threads and back, to the farthest
// of them; 0 where there is no other, or where it did not answer.
double round_trip();

}  // namespace pyperc
