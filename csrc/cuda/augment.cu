// The augmentation on CUDA, forward and backward, in two passes over the sequence.
//
// The sequence is cut into chunks of at most kChunk tokens. (1) chunk_sums: each chunk's sums of decay and phase; (2) prefix: what
// precedes each chunk; (3) augment or backward: a block takes one chunk of one key head with its query heads, scans decay and phase
// in it, and reads and writes the rows. The backward leaves reverse sums that begin anew in every chunk, and each chunk's totals;
// (2) runs again on these, and (4) finish adds what follows each chunk. Running sums are fp64, rows fp32 in registers, and no two
// blocks write to one place: the result is the same bits in every run.

#include <algorithm>
#include <type_traits>

#include "device.cuh"

namespace sisa::cuda {

// Dynamic shared memory; not in the unnamed namespace, so that the host's stand-in can define it.
extern __shared__ double shared_memory[];

namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;  // of a block
constexpr int kBlocks = 5;  // of (3), that the registers of a multiprocessor should hold: with one more, some kernels spill

// A row of sums has a place for each chunk, and one past the end for the total. Rows: for each batch and key head that of the
// decay, then those of the pairs' phases; the backward's have the query heads' dL/dlam after each batch.
__host__ __device__ int64_t columns(const AugmentParams& p) {
  return p.key_heads * (1 + p.state_width / 2);
}

// ---- (1), (2), (4): the running sums -------------------------------------------------------------------------------------------

constexpr int kSegments = 256;

struct Segments {
  Segment segment[kSegments];
};

// The table of segments comes as arguments of launches, since these are copied at once: a copy from the host's memory would have
// to be waited for, or its source kept as long as a captured graph lives.
__global__ void write_table(Segment* table, const Segments part, int count) {
  if (static_cast<int>(threadIdx.x) < count) table[threadIdx.x] = part.segment[threadIdx.x];
}

__global__ void __launch_bounds__(kThreads) chunk_sums(const AugmentParams p, const Cut cut, double* sums) {
  const int n = blockIdx.x % cut.chunks, pairs = p.state_width / 2;
  const int64_t batch = blockIdx.x / cut.chunks, count = columns(p);
  const Chunk chunk = cut.chunk(n);
  for (int column = threadIdx.x; column < count; column += kThreads) {
    const int head = column / (1 + pairs), pair = column % (1 + pairs) - 1;
    const bool decay = pair < 0;
    const float* in = decay ? address<const float>(p.log_decay, batch, chunk.begin, head, 0)
                            : address<const float>(p.theta, batch, chunk.begin, head, pair);
    const int64_t stride = decay ? p.log_decay.token : p.theta.token;
    double sum = 0;
#pragma unroll 8  // loads in flight
    for (int t = 0; t < chunk.tokens; ++t) sum += decay ? bounded_log_decay(in[t * stride]) : in[t * stride];
    sums[(batch * count + column) * (cut.chunks + 1) + n] = sum;
  }
}

// Each row of sums becomes the sums before each chunk, and the total at the end. Phases are not wrapped on the way: at ten million
// radians fp64 still resolves 2e-9, and cos_sin reduces them in fp64.
__global__ void __launch_bounds__(kThreads) prefix(double* sums, int chunks) {
  double* row = sums + static_cast<int64_t>(blockIdx.x) * (chunks + 1);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  double carry = 0;
  for (int first = 0; first < chunks; first += blockDim.x) {
    const int n = first + threadIdx.x;
    const double through = scan(n < chunks ? row[n] : 0, lane), earlier = __shfl_up_sync(kLanes, through, 1);
    if (lane == kWarp - 1) shared_memory[warp] = through;
    __syncthreads();
    double before = lane > 0 ? carry + earlier : carry;
    for (int w = 0; w < warps; ++w) {
      if (w < warp) before += shared_memory[w];
      carry += shared_memory[w];
    }
    __syncthreads();
    if (n < chunks) row[n] = before;
  }
  if (threadIdx.x == 0) row[chunks] = carry;
}

// What m, the mean of the largest and smallest g of a segment, brings to dL/dlog_decay of a token, by dL/dm. As amax and amin have it,
// all tokens of the largest g share its gradient evenly, and those of the smallest; a token's log_decay moves its own g and all later.
struct Middle {
  int64_t begin, end;
  Extremes extremes;
  double gradient;

  __device__ Middle(const AugmentParams& p, const Cut& cut, const Chunk& chunk, int64_t batch, int head, double dm)
      : begin(chunk.segment_begin), end(cut.segment(chunk.segment + 1).begin),
        extremes(extremes_of(address<const float>(p.log_decay, batch, 0, head, 0), p.log_decay.token, begin, end)), gradient(dm) {}

  __device__ double through(int64_t token) const {
    const auto share = [&](int64_t from, int64_t to) { return token < to ? min(1.0, double(to - token) / (to - from)) : 0.0; };
    return gradient / 2 * (share(begin, extremes.largest_end) + share(extremes.smallest_begin, end));
  }
};

// Adds to the reverse sums within each chunk what follows it in its segment, the segment's flux, and what comes through m where the
// exponents are clamped.
template <bool clamped>
__global__ void __launch_bounds__(kThreads) finish(const AugmentBackwardParams p, const Cut cut, const double* before) {
  const int n = blockIdx.x % cut.chunks, pairs = p.state_width / 2;
  const int64_t batch = blockIdx.x / cut.chunks, count = columns(p), rows = count + p.heads;
  const Chunk chunk = cut.chunk(n);
  for (int column = threadIdx.x; column < count; column += kThreads) {
    const int head = column / (1 + pairs), pair = column % (1 + pairs) - 1;
    const bool decay = pair < 0;
    const double *row = before + (batch * rows + column) * (cut.chunks + 1), *flux = decay ? p.decay_flux : p.phase_flux;
    const int64_t stride = decay ? p.key_heads : p.key_heads * pairs, place = decay ? head : head * pairs + pair;
    double after = row[chunk.last] - row[n + 1];
    if (flux) after += flux[(batch * cut.segments + chunk.segment) * stride + place];
    float* out = (decay ? p.dlog_decay : p.dtheta) + (batch * p.length + chunk.begin) * stride + place;
    if constexpr (clamped) {
      if (decay) {
        const Middle middle(p, cut, chunk, batch, head, row[chunk.first] - row[chunk.last]);
        for (int t = 0; t < chunk.tokens; ++t) {
          out[t * stride] = static_cast<float>(out[t * stride] + after + middle.through(chunk.begin + t));
        }
        continue;
      }
    }
#pragma unroll 8
    for (int t = 0; t < chunk.tokens; ++t) out[t * stride] = static_cast<float>(out[t * stride] + after);
  }
  if (blockIdx.x > 0) return;
  for (int head = threadIdx.x; head < p.heads; head += kThreads) {
    double total = 0;
    for (int64_t b = 0; b < p.batch; ++b) total += before[(b * rows + count + head + 1) * (cut.chunks + 1) - 1];
    p.dlam[head] = static_cast<float>(d_lam(total, p.lam[head], p.heads > p.key_heads));
  }
}

// ---- (3): a chunk of one key head ----------------------------------------------------------------------------------------------

// Where a block is; key heads go fastest, since their rows lie side by side.
struct Place {
  int head, n, batch, repeat;  // key head, chunk, sequence, query heads of the key head
  Chunk chunk;

  __device__ Place(const AugmentParams& p, const Cut& cut) {
    const unsigned heads = p.key_heads, row = blockIdx.x / heads;
    head = blockIdx.x % heads, n = row % cut.chunks, batch = row / cut.chunks;
    repeat = static_cast<unsigned>(p.heads) / heads, chunk = cut.chunk(n);
  }

  template <class T>
  __device__ T* row(const Rows& x, int token, int of_head, int channel) const {
    return address<T>(x, batch, chunk.begin + token, of_head, channel);
  }
};

struct Shared {
  double *growth, *shrink;  // [kChunk] exp(g - m) and exp(m - g), clamped
  double* moves;            // [kChunk] 1, or 0 where the clamp binds: the exponent does not move with g
  double* scale;            // [repeat + 1] s of each query head, and of the key head
  double* sums;             // [repeat + 1][kWarps] a head's dL/dexponent, each warp's part
  float2* pairs;            // [kChunk][stride] cosine and sine; in the backward then dL/dphase and dL/dexponent
  int stride;               // odd where the pairs are even in number: lanes on different tokens meet different banks

  __host__ __device__ Shared(const AugmentParams& p, double* at) {
    const int rows = p.heads / p.key_heads + 1;
    growth = at, shrink = growth + kChunk, moves = shrink + kChunk, scale = moves + kChunk, sums = scale + rows;
    pairs = reinterpret_cast<float2*>(sums + rows * kWarps), stride = p.state_width / 2 + 1;
  }

  __device__ Angles angles(int token, int channel, int count) const {
    Angles angles;
#pragma unroll
    for (int i = 0; i < kUnit / 2; ++i) {
      const float2 pair = 2 * i < count ? pairs[token * stride + channel / 2 + i] : float2{0, 0};
      angles.cos.x[i] = pair.x, angles.sin.x[i] = pair.y;
    }
    return angles;
  }
};

size_t shared_bytes(const AugmentParams& p) {
  const Shared shared(p, nullptr);  // laid out from address 0
  return reinterpret_cast<size_t>(shared.pairs + kChunk * shared.stride);
}

// Scans decay and phase in the chunk: a warp a running sum, a lane a token.
__device__ void scan_chunk(const AugmentParams& p, const Cut& cut, const double* before, const Place& at, const Shared& shared) {
  const int lane = threadIdx.x % kWarp, pairs = p.state_width / 2;
  const bool live = lane < at.chunk.tokens;
  const double* rows = before + (at.batch * p.key_heads + at.head) * (1 + pairs) * (cut.chunks + 1);
  for (int row = threadIdx.x / kWarp; row <= pairs; row += kWarps) {
    const double* sums = rows + static_cast<int64_t>(row) * (cut.chunks + 1);
    if (row == 0) {
      const auto log_decay = [&](int t) {
        return bounded_log_decay(*address<const float>(p.log_decay, at.batch, t, at.head, 0));
      };
      const double middle = (sums[at.chunk.first] + log_decay(at.chunk.segment_begin) + sums[at.chunk.last]) / 2;
      const double exponent = sums[at.n] + scan(live ? log_decay(at.chunk.begin + lane) : 0, lane) - middle;
      const double growth = exp(clamped(exponent, p.clamp));
      shared.growth[lane] = growth, shared.shrink[lane] = 1 / growth;
      shared.moves[lane] = fabs(exponent) <= p.clamp ? 1 : 0;
    } else {
      const double own = live ? *at.row<const float>(p.theta, lane, at.head, row - 1) : 0.0f;
      float2 pair;
      cos_sin(sums[at.n] + scan(own, lane), pair.x, pair.y);
      shared.pairs[lane * shared.stride + row - 1] = pair;
    }
  }
  for (int row = threadIdx.x; row <= at.repeat; row += kThreads) {
    const bool query = row < at.repeat, several = at.repeat > 1;
    const double lam = p.lam[at.head * at.repeat + (query ? row : 0)];
    shared.scale[row] = query ? query_scale(p.head_width, lam, several) : key_scale(p.head_width, lam, several);
  }
}

// Calls work(token, channel, count) for all units of the chunk's rows; count is 0 past the chunk's end. Warps come whole.
template <class Work>
__device__ __forceinline__ void for_units(const Place& at, int width, Work work) {
  const int units = (width + kUnit - 1) / kUnit;
  for (int i = threadIdx.x; i < kChunk * units; i += kThreads) {
    const int token = i / units, channel = i % units * kUnit;
    work(token, channel, token < at.chunk.tokens ? min(kUnit, width - channel) : 0);
  }
}

// From the rows of q and k to those of q_aug and k_aug, or, in the backward, from the gradients of these to those of the former.
template <bool inverse, class T, class O>
__device__ void turn_heads(
    const AugmentParams& p, const Place& at, const Rows& q, const Rows& k, const Rows& q_out, const Rows& k_out) {
  for_units(at, p.head_width, [&](int token, int channel, int count) {
    Angles angles;
    if (p.cos.data) {
      angles.cos = load<kUnit / 2>(at.row<const float>(p.cos, token, 0, channel / 2), p.cos.channel, count / 2);
      angles.sin = load<kUnit / 2>(at.row<const float>(p.sin, token, 0, channel / 2), p.sin.channel, count / 2);
    }
    const auto turned = [&](const Channels<kUnit>& x) { return p.cos.data ? rotated<inverse>(x, angles) : x; };
    const auto key = load<kUnit>(at.row<const T>(k, token, at.head, channel), k.channel, count);
    for (int h = at.head * at.repeat; h < (at.head + 1) * at.repeat; ++h) {
      const auto query = load<kUnit>(at.row<const T>(q, token, h, channel), q.channel, count);
      store(turned(query), at.row<O>(q_out, token, h, channel), count);
    }
    store(turned(key), at.row<O>(k_out, token, at.head, channel), count);
  });
}

template <class T, class O>
__global__ void __launch_bounds__(kThreads, kBlocks) augment_chunk(const AugmentParams p, const Cut cut, const double* before) {
  const Place at(p, cut);
  const Shared shared(p, shared_memory);
  scan_chunk(p, cut, before, at, shared);
  turn_heads<false, T, O>(p, at, p.q, p.k, p.q_aug, p.k_aug);
  __syncthreads();

  for_units(at, p.state_width, [&](int token, int channel, int count) {
    const Angles angles = shared.angles(token, channel, count);
    const auto key = load<kUnit>(at.row<const T>(p.b, token, at.head, channel), p.b.channel, count);
    const auto write = [&](const Channels<kUnit>& x, double factor, const Rows& out, int head) {
      const auto augmented = scaled(rotated<false>(x, angles), static_cast<float>(factor));
      store(augmented, at.row<O>(out, token, head, p.head_width + channel), count);
    };
    for (int r = 0; r < at.repeat; ++r) {
      const int head = at.head * at.repeat + r;
      const auto query = load<kUnit>(at.row<const T>(p.c, token, head, channel), p.c.channel, count);
      write(query, shared.scale[r] * shared.growth[token], p.q_aug, head);
    }
    write(key, shared.scale[at.repeat] * shared.shrink[token], p.k_aug, at.head);
  });

  const int used = p.head_width + p.state_width;
  for_units(at, p.width - used, [&](int token, int channel, int count) {
    const Channels<kUnit> zero{};
    for (int h = at.head * at.repeat; h < (at.head + 1) * at.repeat; ++h) {
      store(zero, at.row<O>(p.q_aug, token, h, used + channel), count);
    }
    store(zero, at.row<O>(p.k_aug, token, at.head, used + channel), count);
  });
}

template <class T, class O>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_chunk(const AugmentBackwardParams p, const Cut cut, const double* before, double* totals) {
  const Place at(p, cut);
  const Shared shared(p, shared_memory);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, pairs = p.state_width / 2;
  for (int i = threadIdx.x; i < (at.repeat + 1) * kWarps; i += kThreads) shared.sums[i] = 0;
  scan_chunk(p, cut, before, at, shared);
  turn_heads<true, O, T>(p, at, p.q_aug, p.k_aug, p.dq, p.dk);
  __syncthreads();

  for_units(at, p.state_width, [&](int token, int channel, int count) {
    const Angles angles = shared.angles(token, channel, count);
    double dphase[kUnit / 2] = {}, dexponent = 0;
    const auto back = [&](const Rows& in, const Rows& daugmented, const Rows& din, int head, int row, double factor, int sign) {
      const auto x = load<kUnit>(at.row<const T>(in, token, head, channel), in.channel, count);
      const auto dy = load<kUnit>(at.row<const O>(daugmented, token, head, p.head_width + channel), daugmented.channel, count);
      const auto u = rotated<false>(x, angles), du = scaled(dy, static_cast<float>(factor));
      store(rotated<true>(du, angles), at.row<T>(din, token, head, channel), count);
      double total = 0;
#pragma unroll
      for (int i = 0; i < kUnit; i += 2) {
        total += double(u.x[i]) * du.x[i] + double(u.x[i + 1]) * du.x[i + 1];
        dphase[i / 2] += d_phase(u.x[i], u.x[i + 1], du.x[i], du.x[i + 1]);
      }
      dexponent += sign * total;
      total = reverse_scan(total, lane);
      if (lane == 0) shared.sums[row * kWarps + warp] += total;
    };
    for (int r = 0; r < at.repeat; ++r) {
      back(p.c, p.q_aug, p.dc, at.head * at.repeat + r, r, shared.scale[r] * shared.growth[token], 1);
    }
    back(p.b, p.k_aug, p.db, at.head, at.repeat, shared.scale[at.repeat] * shared.shrink[token], -1);
#pragma unroll
    for (int i = 0; i < kUnit / 2; ++i) {  // in the place of the angles, which this thread alone read
      float2* pair = shared.pairs + token * shared.stride + channel / 2 + i;
      if (2 * i < count) *pair = {static_cast<float>(dphase[i]), i == 0 ? static_cast<float>(dexponent) : 0};
    }
  });
  __syncthreads();

  const int64_t rows = columns(p) + p.heads, token = at.batch * p.length + at.chunk.begin + lane;
  double* own = totals + (at.batch * rows + at.head * (1 + pairs)) * (cut.chunks + 1) + at.n;
  for (int row = warp; row <= pairs; row += kWarps) {
    const float2* pair = shared.pairs + lane * shared.stride;
    const bool live = lane < at.chunk.tokens;
    double x = 0;
    if (row > 0) {
      x = live ? pair[row - 1].x : 0;
    } else if (live && shared.moves[lane] != 0) {
      for (int i = 0; i < pairs; ++i) x += pair[i].y;
    }
    x = reverse_scan(x, lane);
    const int64_t head = token * p.key_heads + at.head;
    if (live) *(row == 0 ? p.dlog_decay + head : p.dtheta + head * pairs + row - 1) = static_cast<float>(x);
    if (lane == 0) own[static_cast<int64_t>(row) * (cut.chunks + 1)] = x;
  }
  for (int r = threadIdx.x; r < at.repeat; r += kThreads) {
    double total = 0;  // a key head's own rows count where it has one query head: both carry its lam
    for (int w = 0; w < kWarps; ++w) total += shared.sums[r * kWarps + w] + (at.repeat == 1 ? shared.sums[kWarps + w] : 0);
    totals[(at.batch * rows + columns(p) + at.head * at.repeat + r) * (cut.chunks + 1) + at.n] = total;
  }
}

// ---- Launches ------------------------------------------------------------------------------------------------------------------

// Launches kernel after kernel until one fails.
struct Launcher {
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;

  const char* fault() const { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

  template <class... Params, class... Args>
  void operator()(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, Args... args) {
    if (blocks > INT32_MAX) error = cudaErrorInvalidValue;
    if (error != cudaSuccess) return;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared, config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, args...);
  }
};

int64_t segment_end(const AugmentParams& p, int64_t n) {
  return n + 1 < p.segments ? p.starts[n + 1] : p.length;
}

int64_t chunk_count(const AugmentParams& p) {
  int64_t chunks = 0;
  for (int64_t n = 0; n < p.segments; ++n) chunks += (segment_end(p, n) - p.starts[n] + kChunk - 1) / kChunk;
  return chunks;
}

// The cut of the sequence, its table written where there is more than one segment.
Cut cut_sequence(const AugmentParams& p, double* workspace, Launcher& launch) {
  auto* table = reinterpret_cast<Segment*>(workspace);
  static_assert(sizeof(Segment) == sizeof(double));
  int64_t chunks = 0;
  for (int64_t first = 0; first < p.segments; first += kSegments) {
    Segments part{};
    const int count = static_cast<int>(std::min<int64_t>(kSegments, p.segments - first));
    for (int i = 0; i < count; ++i) {
      const int64_t begin = p.starts[first + i];
      part.segment[i] = {static_cast<int>(begin), static_cast<int>(chunks)};
      chunks += (segment_end(p, first + i) - begin + kChunk - 1) / kChunk;
    }
    if (p.segments > 1) launch(write_table, 1, kSegments, 0, table + first, part, count);
  }
  if (p.length > INT32_MAX) launch.error = cudaErrorInvalidValue;
  return {table, static_cast<int>(p.segments), static_cast<int>(chunks), static_cast<int>(p.length)};
}

void launch_prefix(double* sums, int64_t rows, int chunks, Launcher& launch) {
  const int threads = std::min(kThreads, (chunks + kWarp - 1) / kWarp * kWarp);
  launch(prefix, rows, threads, kWarps * sizeof(double), sums, chunks);
}

// The sums of decay and phase before each chunk.
void launch_scans(const AugmentParams& p, const Cut& cut, double* sums, Launcher& launch) {
  launch(chunk_sums, p.batch * cut.chunks, kThreads, 0, p, cut, sums);
  launch_prefix(sums, p.batch * columns(p), cut.chunks, launch);
}

}  // namespace

int64_t augment_workspace(const AugmentParams& p) {
  return p.segments + p.batch * columns(p) * (chunk_count(p) + 1);
}

int64_t augment_backward_workspace(const AugmentParams& p) {
  return augment_workspace(p) + p.batch * (columns(p) + p.heads) * (chunk_count(p) + 1);
}

const char* augment(const AugmentParams& p, double* workspace, void* stream) {
  Launcher launch{static_cast<cudaStream_t>(stream)};
  const Cut cut = cut_sequence(p, workspace, launch);
  double* before = workspace + p.segments;
  launch_scans(p, cut, before, launch);
  with_types<__nv_bfloat16, __half>(p, [&]<class T, class O>(std::type_identity<T>, std::type_identity<O>) {
    launch(augment_chunk<T, O>, p.batch * cut.chunks * p.key_heads, kThreads, shared_bytes(p), p, cut, before);
  });
  return launch.fault();
}

const char* augment_backward(const AugmentBackwardParams& p, double* workspace, void* stream) {
  Launcher launch{static_cast<cudaStream_t>(stream)};
  const Cut cut = cut_sequence(p, workspace, launch);
  double *before = workspace + p.segments, *totals = before + p.batch * columns(p) * (cut.chunks + 1);
  launch_scans(p, cut, before, launch);
  with_types<__nv_bfloat16, __half>(p, [&]<class T, class O>(std::type_identity<T>, std::type_identity<O>) {
    launch(backward_chunk<T, O>, p.batch * cut.chunks * p.key_heads, kThreads, shared_bytes(p), p, cut, before, totals);
  });
  launch_prefix(totals, p.batch * (columns(p) + p.heads), cut.chunks, launch);
  launch(p.clamp < INFINITY ? finish<true> : finish<false>, p.batch * cut.chunks, kThreads, 0, p, cut, totals);
  return launch.fault();
}

}  // namespace sisa::cuda
