// The activations of the running tier against double, over all floats: value and slope. They are reached as
// the products reach them, through tiles made by hand.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "../cpu/kernels.h"
#include "layers.h"
#include "tests.h"

namespace clipup::tests {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Errors, each about twice what was measured in the worst tier.
//   value, slope       absolute, in units of max(1, |z|); slopes are of order one wherever they are not zero
//   relative           of the value, at any z where it is larger than kTail
//   slope_relative     of the slope, in the left tail (z < -4), far from its zero
struct Bounds {
  double value, slope, relative, slope_relative;
};
constexpr Bounds kBounds[] = {
    {2.2e-7, 4.8e-7, 8.2e-6, 8.0e-6},  // gelu
    {2.9e-7, 4.2e-7, 2.5e-5, 2.5e-5},  // gelu_tanh
    {2.9e-7, 3.9e-7, 1.0e-5, 1.0e-5},  // quick_gelu
    {0.0, 0.0, 0.0, 0.0},              // relu
    {2.9e-7, 3.9e-7, 4.9e-7, 9.2e-7},  // silu
};
static_assert(sizeof kBounds / sizeof kBounds[0] == kActivations);
constexpr double kTail = 1e-35;  // below it an exponential may be subnormal, which is taken for 0

struct Results {
  std::vector<float> value, slope, value_backward;
};

// The activation of every z, a panel at a time: forward's value, and backward's value and slope.
Results run(Activation activation, const std::vector<float>& z) {
  const Kernels& ks = kernels();
  const TypedKernels& typed = ks.of(DType::kFloat32);
  const auto index = static_cast<int>(activation);
  const auto panel = static_cast<std::size_t>(ks.panel);
  const std::vector<float> ones(panel, 1.0F);
  std::vector<float> in(panel), kept(panel);
  std::vector<Word> a(panel + kLineWords), dz(panel + kLineWords), b_panel(panel);
  Results all;
  const auto append = [](std::vector<float>& to, const std::vector<Word>& words, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) to.push_back(bits_float(words[i]));
  };
  for (std::size_t begin = 0; begin < z.size(); begin += panel) {
    const std::size_t count = std::min(panel, z.size() - begin);
    std::fill(in.begin(), in.end(), 0.0F);
    std::copy_n(z.begin() + static_cast<std::ptrdiff_t>(begin), count, in.begin());

    HiddenTile hidden{};
    hidden.rows = 1;
    hidden.end = 1;
    hidden.columns = ks.panel;
    hidden.c = in.data();
    hidden.z = kept.data();
    hidden.z_stride = ks.panel;
    hidden.a = a.data();
    typed.finish_hidden[index](hidden);
    append(all.value, a, count);

    HiddenGradientTile gradient{};
    gradient.rows = 1;
    gradient.columns = ks.panel;
    gradient.da = ones.data();
    gradient.z = in.data();
    gradient.z_stride = ks.panel;
    gradient.gates = ones.data();
    gradient.dz = dz.data();
    gradient.hidden_b_panels = b_panel.data();
    gradient.panel_words = 1;
    typed.finish_hidden_gradient[index](gradient);
    append(all.slope, dz, count);
    append(all.value_backward, b_panel, count);
    for (std::size_t i = 0; i < count; ++i) {
      if (kept[i] != in[i]) EXPECT(std::isnan(in[i]) && std::isnan(kept[i]));
    }
  }
  return all;
}

// |z| from 1e-30 to 1e4 in steps of the float's bits, where activations bend in finer ones, and on to the
// largest.
std::vector<float> sweep() {
  std::vector<float> z;
  const auto add = [&](float first, float last, std::uint32_t step) {
    for (std::uint32_t bits = float_bits(first); bits <= float_bits(last); bits += step) {
      z.push_back(bits_float(bits));
      z.push_back(-bits_float(bits));
    }
  };
  const std::uint32_t coarse = quick() ? 400009 : 20011;
  add(1e-30F, 1e4F, coarse);
  add(1.0F / 16, 16.0F, quick() ? 20011 : 499);
  add(1e4F, std::numeric_limits<float>::max(), 10 * coarse);
  add(0.0F, 1e-30F, 10 * coarse);
  return z;
}

void expect_errors(Activation activation, const std::vector<float>& z) {
  const auto index = static_cast<int>(activation);
  const Results results = run(activation, z);
  Bounds worst{};
  for (std::size_t i = 0; i < z.size(); ++i) {
    const Act exact = activation_at(activation, z[i]);
    const double unit = std::max(1.0, std::abs(static_cast<double>(z[i])));
    for (const float value : {results.value[i], results.value_backward[i]}) {
      const double error = std::abs(value - exact.value);
      worst.value = std::max(worst.value, std::isnan(error) ? kInfinity : error / unit);
      if (std::abs(exact.value) > kTail) {
        worst.relative = std::max(worst.relative, error / std::abs(exact.value));
      }
    }
    // Beyond 1e19 the cube of gelu_tanh's slope is infinite: 0 times that.
    if (activation == Activation::kGeluTanh && unit > 1e19) continue;
    const double error = std::abs(results.slope[i] - exact.slope);
    worst.slope = std::max(worst.slope, std::isnan(error) ? kInfinity : error);
    if (z[i] < -4.0F && std::abs(exact.slope) > kTail) {
      worst.slope_relative = std::max(worst.slope_relative, error / std::abs(exact.slope));
    }
  }
  const Bounds& bounds = kBounds[index];
  if (print_errors()) {
    std::printf("%-10s value %.2e of %.2e, slope %.2e of %.2e, relative %.2e of %.2e and %.2e of %.2e\n",
                kActivationNames[index], worst.value, bounds.value, worst.slope, bounds.slope, worst.relative,
                bounds.relative, worst.slope_relative, bounds.slope_relative);
  }
  describe(std::string(kActivationNames[index]) + " value " + std::to_string(worst.value * 1e6) +
           "e-6 slope " + std::to_string(worst.slope * 1e6) + "e-6 relative " +
           std::to_string(worst.relative * 1e6) + "e-6 and " + std::to_string(worst.slope_relative * 1e6) +
           "e-6");
  EXPECT(worst.value <= bounds.value);
  EXPECT(worst.slope <= bounds.slope);
  EXPECT(worst.relative <= bounds.relative);
  EXPECT(worst.slope_relative <= bounds.slope_relative);
  count_elements(static_cast<std::int64_t>(3 * z.size()));
}

// Where there is no error to measure: the limit, or the NaN of 0 times infinity.
void expect_special(Activation activation) {
  describe(kActivationNames[static_cast<int>(activation)]);
  const bool relu = activation == Activation::kRelu;
  const float infinity = std::numeric_limits<float>::infinity();
  const Results at = run(activation, {0.0F, -0.0F, infinity, -infinity, NAN, -NAN});
  for (const std::vector<float>* const value : {&at.value, &at.value_backward}) {
    EXPECT((*value)[0] == 0.0F && (*value)[1] == 0.0F);
    EXPECT((*value)[2] == infinity);
    EXPECT((*value)[3] == 0.0F || (!relu && std::isnan((*value)[3])));
    EXPECT(std::isnan((*value)[4]) && std::isnan((*value)[5]));
  }
  EXPECT(std::abs(at.slope[0] - (relu ? 0.0F : 0.5F)) < 1e-7 && at.slope[1] == at.slope[0]);
  EXPECT(at.slope[2] == 1.0F || (!relu && std::isnan(at.slope[2])));
  EXPECT(at.slope[3] == 0.0F || (!relu && std::isnan(at.slope[3])));
  EXPECT(relu || (std::isnan(at.slope[4]) && std::isnan(at.slope[5])));
}

}  // namespace

void test_activations() {
  const std::vector<float> z = sweep();
  for (int i = 0; i < kActivations; ++i) {
    expect_errors(Activation{i}, z);
    expect_special(Activation{i});
  }
}

}  // namespace clipup::tests
